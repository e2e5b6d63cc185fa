"""From a recipe to a plan: every tensor of the result with its readers, method and parameters. Nothing is written.

Time is linear in the number of tensors; of weights only headers are read (and integer tensors, which must be equal).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from toolkit.errors import ModelError
from toolkit.merging.companions import Companions
from toolkit.merging.fisher_files import FisherFile, open_fisher
from toolkit.merging.group import FisherTensor, Reader
from toolkit.merging.model_inputs import ModelInput, local_folder, open_source, same_elements
from toolkit.merging.parameters import Levels, Resolver
from toolkit.merging.plan import InputModel, MergePlan, OutputTensor
from toolkit.merging.recipe import Location, MergeRecipe, ModelReference
from toolkit.merging.recipe_checks import notes_on_settings
from toolkit.merging.registry import MergeMethod, merge_methods
from toolkit.merging.sections import Section, TensorRequest, donor_of, sections_of
from toolkit.merging.vocabulary import (
    Alignment,
    Truncated,
    Unified,
    has_row_for_each_token,
    unify,
)
from toolkit_kernels.spans import CODES

# Buffers that older versions of transformers saved and that every model makes anew.
DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "embeddings.position_ids", "rope_freqs")
MAX_PROBLEMS = 10


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


@dataclass
class _Missing:
    """Tensors that not all models have, gathered for one message."""

    problems: list[str] = field(default_factory=list)
    present: dict[str, list[str]] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)


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
        self.resolver = Resolver(self.method, recipe)
        self.notes = [*recipe.notes, *notes_on_settings(recipe)]
        self.missing = _Missing()
        self.problems: list[str] = []
        self.fishers: dict[str, FisherFile] = {}
        self.without_fisher: dict[str, list[str]] = {}
        self.levels: dict[tuple[int, tuple[int, ...]], Levels] = {}
        self.merged = self._merged_models()
        self.alignment = self._alignment(folder_of)

    def plan(self) -> MergePlan:
        self._check_architectures()
        sections, config, notes = sections_of(self.recipe, self.method, self.inputs)
        tensors = [
            tensor
            for section in sections
            for request in section.requests
            if (tensor := self._tensor(section, request)) is not None
        ]
        self.notes += notes
        self._raise_problems()
        self._note_what_is_special()
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
        )

    # --- one tensor

    def _tensor(self, section: Section, request: TensorRequest) -> OutputTensor | None:
        found = [
            self.inputs[model].reader(own)
            for model, own in zip(section.models, request.own_names, strict=True)
        ]
        base = self.inputs[section.base].reader(request.base_name) if section.base else None
        levels = section.levels
        if None in found or (section.base is not None and base is None):
            if not self._may_be_missing(section, request, found, base):
                return None
            kept = tuple(index for index, reader in enumerate(found) if reader is not None)
            if not self._can_merge(section, len(kept), base):
                only = base if base is not None else found[kept[0]]
                return only and self._copy(request.name, only, self._dtype([only]))
            levels = self._subset(section, kept)
            section = replace(section, models=tuple(section.models[index] for index in kept), levels=levels)
            own_names = tuple(request.own_names[index] for index in kept)
            request = TensorRequest(request.name, own_names, request.base_name, request.t)
            found = [found[index] for index in kept]
        readers = [reader for reader in found if reader is not None]
        everything = readers if base is None else [*readers, base]
        if any(reader.dtype not in CODES for reader in everything):
            return self._not_floating(request.name, everything)
        dtype = self._dtype(everything)
        everything = self._aligned(section, request.name, everything)
        if not self._shapes_fit(request.name, everything):
            return None
        is_aligned = any(new is not old for new, old in zip(everything, [*readers, base], strict=False))
        readers, base = everything[: len(readers)], everything[-1] if base is not None else None
        return self._merged(section, request, readers, base, dtype, is_aligned)

    def _merged(
        self,
        section: Section,
        request: TensorRequest,
        readers: list[Reader],
        base: Reader | None,
        dtype: str,
        is_aligned: bool,
    ) -> OutputTensor | None:
        try:
            arguments = self.resolver.arguments(section.levels, request.name, request.own_names, request.t)
            fisher = self._fisher(section, request, readers, is_aligned) if self.method.needs_fisher else ()
        except LookupError as error:
            self.problems.append(str(error))
            return None
        shape = readers[0].shape
        return OutputTensor(request.name, shape, dtype, tuple(readers), base, fisher, self.method, arguments)

    def _dtype(self, readers: list[Reader]) -> str:
        """Of the result: as the recipe says, else the type that holds the values of all inputs."""
        if wanted := self.recipe.out_dtype or self.recipe.dtype:
            return wanted
        dtypes = {reader.dtype for reader in readers}
        if len(dtypes) == 1:
            return dtypes.pop()
        return "float64" if "float64" in dtypes else "float32"

    def _copy(self, name: str, reader: Reader, dtype: str) -> OutputTensor:
        if dtype == reader.dtype or reader.dtype not in CODES:
            return OutputTensor(name, reader.shape, reader.dtype, (reader,))
        as_it_is = merge_methods()["passthrough"]
        return OutputTensor(
            name, reader.shape, dtype, (reader,), method=as_it_is, parameters=as_it_is.arguments({}, 1)
        )

    def _not_floating(self, name: str, readers: list[Reader]) -> OutputTensor | None:
        first = readers[0]
        other = next((reader for reader in readers[1:] if not same_elements(first, reader)), None)
        if other is None:
            return self._copy(name, first, first.dtype)
        self.problems.append(
            f"{name} is {first.dtype} in {first.where} and differs from that ({other.dtype}) in {other.where}; "
            "numbers that are not floating-point are copied, so all models must have the same"
        )
        return None

    def _aligned(self, section: Section, name: str, readers: list[Reader]) -> list[Reader]:
        if self.alignment is None or not has_row_for_each_token(name):
            return readers
        references = [
            *section.models,
            *([section.base] if len(readers) > len(section.models) and section.base else []),
        ]
        aligned = self.alignment.aligned(name, dict(zip(references, readers, strict=True)))
        return [aligned[reference] for reference in references]

    def _shapes_fit(self, name: str, readers: list[Reader]) -> bool:
        first = readers[0]
        other = next((reader for reader in readers[1:] if reader.shape != first.shape), None)
        if other is None:
            return True
        text = f"{name} is {list(first.shape)} in {first.where} and {list(other.shape)} in {other.where}"
        if has_row_for_each_token(name) and first.shape[1:] == other.shape[1:]:
            text += ": the vocabularies differ"
        self.problems.append(text)
        return False

    # --- tensors that some models lack

    def _may_be_missing(
        self, section: Section, request: TensorRequest, found: list[Reader | None], base: Reader | None
    ) -> bool:
        models = [*section.models, *([section.base] if section.base else [])]
        readers = [*found, *([base] if section.base else [])]
        lacking = [str(model) for model, reader in zip(models, readers, strict=True) if reader is None]
        if request.name.endswith(DERIVED):
            self.missing.derived.append(request.name)
            return False
        if self.options.on_missing == "present":
            self.missing.present.setdefault(", ".join(lacking), []).append(request.name)
            return True
        holder = next(reader.where for reader in readers if reader is not None)
        where = ", ".join(
            str(self.inputs[m].source.folder) for m, r in zip(models, readers, strict=True) if r is None
        )
        self.missing.problems.append(f"{request.name} is in {holder} and not in {where}")
        return False

    def _can_merge(self, section: Section, num_present: int, base: Reader | None) -> bool:
        """Whether enough models have a tensor for the method; else it is copied from the one that counts most."""
        fewest = self.method.num_models[0] + (1 if self.method.base_is_a_model else 0)
        return num_present >= fewest and (section.base is None or base is not None)

    def _subset(self, section: Section, kept: tuple[int, ...]) -> Levels:
        key = (id(section.levels), kept)
        if key not in self.levels:
            own = tuple(section.levels.models[index] for index in kept)
            self.levels[key] = Levels(section.levels.shared, own)
        return self.levels[key]

    # --- Fisher

    def _fisher(
        self, section: Section, request: TensorRequest, readers: list[Reader], is_aligned: bool
    ) -> tuple[FisherTensor | None, ...]:
        paths = self.resolver.fishers(section.levels, request.name, request.own_names, request.t)
        found: list[FisherTensor | None] = []
        for model, path, own, reader in zip(section.models, paths, request.own_names, readers, strict=True):
            name = self.inputs[model].actual_name(own)
            entry = None if is_aligned else self._fisher_file(path).tensor(name, reader.shape)
            if entry is None:
                self.without_fisher.setdefault(path, []).append(request.name)
            found.append(entry)
        return tuple(found)

    def _fisher_file(self, path: str) -> FisherFile:
        if path not in self.fishers:
            file = Path(path).expanduser()
            if not file.exists():
                raise ModelError(f"there is no Fisher file {path}", hint="meldkit fisher makes it")
            self.fishers[path] = open_fisher(file)
        return self.fishers[path]

    # --- all models

    def _merged_models(self) -> list[ModelReference]:
        """Without a base that only gives configuration and tokenizer."""
        base = self.recipe.base_model
        listed = replace(self.recipe, base_model=None).references()
        if base is not None and base not in listed and self.method.base == "none":
            self.notes.append(
                f"{base} gives configuration and tokenizer; {self.method.name} has no base, so its weights do not count"
            )
            return listed
        return self.recipe.references()

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

    def _raise_problems(self) -> None:
        problems = [*self.missing.problems, *self.problems]
        if not problems:
            return
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more tensors")
        hints = []
        if self.missing.problems:
            hints.append("--on-missing present merges a tensor from the models that have it")
        if any("vocabularies differ" in problem for problem in problems):
            hints.append(
                "tokenizer_source: union (or base) aligns vocabularies by token; "
                "--unsafe-truncate-embeddings cuts them to the same length"
            )
        raise ModelError(
            "\n  ".join(["the models do not fit together:", *shown]), hint="; ".join(hints) or None
        )

    def _note_what_is_special(self) -> None:
        for lacking, names in self.missing.present.items():
            self.notes.append(f"{_some(names)} not in {lacking}: merged from the other models, or copied")
        if self.missing.derived:
            self.notes.append(
                f"{_some(self.missing.derived)} left out: not in all models, and made anew by each"
            )
        for path, names in self.without_fisher.items():
            if len(names) < MAX_PROBLEMS or len(names) < sum(len(self.inputs[m].names) for m in self.merged):
                self.notes.append(f"{path} does not cover {_some(names)}: the plain weighted mean there")
        settings = {entry.model: entry.parameters for entry in self.recipe.models}
        base = self.recipe.base_model
        if base is not None and self.method.base != "none" and settings.get(base):
            self.notes.append(f"the parameters of {base} have no effect: it is the base")
        if self.recipe.dtype and self.recipe.out_dtype and self.recipe.dtype != self.recipe.out_dtype:
            self.notes.append("dtype has no effect beside out_dtype: sums are formed in float64")

    def _input_models(self) -> list[InputModel]:
        found = []
        for reference, model in self.inputs.items():
            is_read = reference in self.merged
            role = "tokenizer" if not is_read else "base" if reference == self.recipe.base_model else "model"
            found.append(InputModel(str(reference), role, tuple(model.source.files) if is_read else ()))
        return found + [InputModel(path, "fisher", (file.path,)) for path, file in self.fishers.items()]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
