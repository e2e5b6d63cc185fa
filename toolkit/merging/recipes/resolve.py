"""From a recipe to a plan: every tensor of the result with its readers, method and parameters. Nothing is written.

Time is linear in the number of tensors; of weights only headers are read (and integer tensors, which must be equal).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from toolkit.errors import ModelError
from toolkit.merging.plan import InputModel, MergePlan
from toolkit.merging.recipes.companions import Companions
from toolkit.merging.recipes.model_inputs import ModelInput, local_folder, open_source
from toolkit.merging.recipes.recipe import Location, MergeRecipe, ModelReference
from toolkit.merging.recipes.recipe_checks import notes_on_settings
from toolkit.merging.recipes.sections import donor_of, sections_of
from toolkit.merging.recipes.tensor_planner import TensorPlanner
from toolkit.merging.recipes.tokenizer import unify
from toolkit.merging.recipes.vocabulary import Alignment, Truncated, Unified
from toolkit.merging.registry import MergeMethod, merge_methods


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the command line says about a plan beside the recipe.

    Attributes:
        seed: of random masks.
        mix_architectures: merge models of different architectures by the names of their tensors.
        truncate_embeddings: cut embeddings to the smallest vocabulary.
        on_missing: a tensor that some models lack is an error, or is merged from those that have it ("present").
        hub_cache: where models from the hub lie; None for the usual place.
        download: fetch models that are not there.
        copy_code: copy the Python files that a model brings; they are never run here.
        copy_tokenizer: and chat template.
        write_card: README.md.
    """

    seed: int = 0
    mix_architectures: bool = False
    truncate_embeddings: bool = False
    on_missing: Literal["error", "present"] = "error"
    hub_cache: Path | None = None
    download: bool = True
    copy_code: bool = False
    copy_tokenizer: bool = True
    write_card: bool = True


def plan_merge(recipe: MergeRecipe, options: PlanOptions | None = None) -> MergePlan:
    """Find the models and decide everything.

    Raises:
        ModelError: a model is missing or unsound, tensors do not fit together; names them, their files and shapes.
        ConfigError: a parameter is wrong.
    """
    options = options or PlanOptions()

    def folder_of(location: Location) -> Path:
        return local_folder(
            location, cache_folder=options.hub_cache, download=options.download, with_code=options.copy_code
        )

    locations = {part for reference in recipe.references() for part in (reference.model, *reference.loras)}
    folders = {location: folder_of(location) for location in sorted(locations, key=str)}
    inputs = {
        reference: ModelInput(reference, open_source(reference, folders)) for reference in recipe.references()
    }
    return Planner(recipe, options, inputs, lambda reference: folder_of(reference.model)).plan()


class Planner:
    """Makes the plan of one recipe.

    Args:
        inputs: every model that the recipe names.
        folder_of: where a model lies of which only the tokenizer is wanted.
    """

    def __init__(
        self,
        recipe: MergeRecipe,
        options: PlanOptions,
        inputs: Mapping[ModelReference, ModelInput],
        folder_of: Callable[[ModelReference], Path],
    ) -> None:
        self.recipe = recipe
        self.options = options
        self.inputs = inputs
        self.method: MergeMethod = merge_methods()[recipe.merge_method]
        self.donor = inputs[donor_of(recipe)]
        self.notes = [*recipe.notes, *notes_on_settings(recipe)]
        for model in inputs.values():
            self.notes += getattr(model.source, "notes", [])
        self.merged = self._merged_models()
        self.alignment = self._alignment(folder_of)
        self.tensors = TensorPlanner(recipe, self.method, inputs, self.alignment, options.on_missing)

    def plan(self) -> MergePlan:
        self._check_architectures()
        sections, config, notes = sections_of(self.recipe, self.method, self.inputs)
        tensors = [
            tensor
            for section in sections
            for request in section.requests
            if (tensor := self.tensors.tensor(section, request)) is not None
        ]
        self.notes += notes
        self.tensors.raise_problems()
        self.notes += self.tensors.notes()
        self._note_what_has_no_effect()
        if self.alignment is not None:
            self.notes += self.alignment.notes
        companions = Companions(
            recipe=self.recipe,
            method=self.method,
            donor=self.donor,
            inputs=self.inputs,
            config=config,
            unified=self.alignment if isinstance(self.alignment, Unified) else None,
            copy_code=self.options.copy_code,
            copy_tokenizer=self.options.copy_tokenizer,
            write_card=self.options.write_card,
            tensors=tensors,
        )
        self.notes += companions.notes()
        return MergePlan(
            tensors=tensors,
            inputs=self._input_models(),
            method=self.method.name,
            seed=self.options.seed,
            settings={"recipe": self.recipe.text},
            notes=list(dict.fromkeys(self.notes)),
            write_companions=companions.write,
            depends_on=self._folders(),
        )

    # --- all models

    def _merged_models(self) -> list[ModelReference]:
        """Without a base that only gives configuration and tokenizer."""
        recipe, base = self.recipe, self.recipe.base_model
        listed = replace(recipe, base_model=None).references()
        if base is None or base in listed or self.method.base != "none":
            return recipe.references()
        if recipe.models or any(module.models for module in recipe.modules.values()):
            self.notes.append(f"{base} is merged as the other models are: {self.method.name} has no base")
            return recipe.references()
        self.notes.append(f"{base} gives configuration and tokenizer only: no slice is cut from it")
        return listed

    def _alignment(self, folder_of: Callable[[ModelReference], Path]) -> Alignment | None:
        if self.recipe.tokenizer is not None:
            if self.options.truncate_embeddings:
                raise ModelError(
                    "--unsafe-truncate-embeddings and a tokenizer source are two ways; choose one"
                )
            models = {model: self.inputs[model].tokenizer_folder for model in self.merged}
            donor = self.donor.reference
            return unify(self.recipe.tokenizer, donor, models, self.donor.tokenizer_folder, folder_of)
        return Truncated() if self.options.truncate_embeddings else None

    def _check_architectures(self) -> None:
        kinds: dict[str, ModelReference] = {}
        for reference in self.merged:
            names = self.inputs[reference].config.get("architectures") or ["?"]
            kinds.setdefault(str(names[0]), reference)
        if len(kinds) < 2:
            return
        text = ", ".join(f"{model} is {kind}" for kind, model in kinds.items())
        if not self.options.mix_architectures:
            raise ModelError(
                f"the models are of different architectures: {text}",
                hint="--allow-crimes merges them all the same, by the names of their tensors",
            )
        self.notes.append(f"different architectures are mixed: {text}")

    def _note_what_has_no_effect(self) -> None:
        settings = {entry.model: entry.parameters for entry in self.recipe.models}
        base = self.recipe.base_model
        if base is not None and self.method.base != "none" and settings.get(base):
            self.notes.append(f"the parameters of {base} have no effect: it is the base")
        if self.recipe.dtype and self.recipe.out_dtype and self.recipe.dtype != self.recipe.out_dtype:
            self.notes.append("dtype has no effect beside out_dtype: sums are formed in float64")

    def _folders(self) -> tuple[Path, ...]:
        """Of every model and adapter, those that give only configuration or tokenizer included."""
        found: dict[Path, None] = {}
        for model in self.inputs.values():
            files = (path.parent for path in model.source.files)
            found |= dict.fromkeys((model.source.folder, model.tokenizer_folder, *files))
        if isinstance(self.alignment, Unified):
            found[self.alignment.origin] = None
        return tuple(found)

    def _input_models(self) -> list[InputModel]:
        found = []
        for reference, model in self.inputs.items():
            is_read = reference in self.merged
            is_base = self.method.base != "none" and reference == self.recipe.base_model
            role = "tokenizer" if not is_read else "base" if is_base else "model"
            found.append(InputModel(str(reference), role, tuple(model.source.files) if is_read else ()))
        found += [
            InputModel(path, "fisher", (file.path,)) for path, file in self.tensors.fisher.files.items()
        ]
        for role, paths in self.tensors.files.items():
            found += [InputModel(str(path), role, (path,)) for path in paths]
        return found
