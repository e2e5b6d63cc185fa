"""One tensor of the result: its readers in every model, and what is done where they do not fit together."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from toolkit.errors import ModelError
from toolkit.merging.group import FisherTensor, Reader, stored_dtype
from toolkit.merging.plan import OutputTensor
from toolkit.merging.recipes.fisher_inputs import FisherInputs
from toolkit.merging.recipes.model_inputs import ModelInput, same_elements
from toolkit.merging.recipes.parameters import Levels, Resolver
from toolkit.merging.recipes.recipe import MergeRecipe, ModelReference
from toolkit.merging.recipes.sections import Section, TensorRequest
from toolkit.merging.recipes.vocabulary import Alignment, has_row_for_each_token
from toolkit.merging.registry import MergeMethod, merge_methods
from toolkit_kernels.spans import CODES

# Buffers that older versions of transformers saved and that every model makes anew.
DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "embeddings.position_ids", "rope_freqs")
MAX_PROBLEMS = 10


@dataclass
class _Missing:
    """Tensors that not all models have."""

    problems: list[str] = field(default_factory=list)
    present: dict[str, list[str]] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)


class TensorPlanner:
    """Plans tensor after tensor. What does not fit is collected, and raised at the end as one error.

    Args:
        recipe: what is merged.
        method: its method.
        inputs: every model.
        alignment: of different vocabularies.
        on_missing: see PlanOptions.
    """

    def __init__(
        self,
        recipe: MergeRecipe,
        method: MergeMethod,
        inputs: Mapping[ModelReference, ModelInput],
        alignment: Alignment | None,
        on_missing: Literal["error", "present"],
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.inputs = inputs
        self.alignment = alignment
        self.on_missing = on_missing
        self.resolver = Resolver(method, recipe)
        self.missing = _Missing()
        self.problems: list[str] = []
        self.fisher = FisherInputs(inputs, alignment)
        self.files: dict[str, dict[Path, None]] = {}
        self.levels: dict[tuple[int, tuple[int, ...]], Levels] = {}

    def tensor(self, section: Section, request: TensorRequest) -> OutputTensor | None:
        """Plan one; None where it is left out or does not fit."""
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
            if section.base is not None and base is None and len(kept) > 1:
                where = self.inputs[section.base].source.folder
                self.problems.append(
                    f"{request.name} is not in the base {where}: there is nothing to take deltas from"
                )
                return None
            if not self._can_merge(section, len(kept), base):
                present = [
                    *zip((section.base,), (base,), strict=True),
                    *zip(section.models, found, strict=True),
                ]
                model, only = next((model, reader) for model, reader in present if reader is not None)
                return self._copied_from(model, request.name, only)
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
        aligned = self._aligned(section, request.name, everything)
        if not self._shapes_fit(request.name, aligned):
            return None
        try:
            parameters = self._parameters(section, request)
            fisher = self._fisher(section, request, readers) if self.method.needs_fisher else ()
        except LookupError as error:
            self.problems.append(str(error))
            return None
        models, base = tuple(aligned[: len(readers)]), aligned[-1] if base is not None else None
        return OutputTensor(
            request.name, models[0].shape, dtype, models, base, fisher, self.method, parameters
        )

    def _parameters(self, section: Section, request: TensorRequest) -> Mapping[str, Any]:
        """Of the method for one tensor; files among them are inputs of the merge. Raises LookupError."""
        found = self.resolver.arguments(section.levels, request.name, request.own_names, request.t)
        for parameter in self.method.parameters:
            if parameter.kind is Path:
                value = found[parameter.argument]
                paths = dict.fromkeys(value if parameter.per_model else [value])
                if missing := [path for path in paths if not path.is_file()]:
                    raise ModelError(f"there is no file {missing[0]}, which '{parameter.name}' names")
                self.files.setdefault(parameter.name, {}).update(paths)
        return found

    def _fisher(
        self, section: Section, request: TensorRequest, readers: list[Reader]
    ) -> tuple[FisherTensor | None, ...]:
        """Raises LookupError."""
        paths = self.resolver.fishers(section.levels, request.name, request.own_names, request.t)
        own = dict(zip(section.models, readers, strict=True))
        return self.fisher.tensors(request.name, own, request.own_names, paths)

    def _dtype(self, readers: list[Reader]) -> str:
        """Of the result: as the recipe says, else the type that holds the values of all inputs."""
        if wanted := self.recipe.out_dtype or self.recipe.dtype:
            return wanted
        dtypes = {stored_dtype(reader) for reader in readers}
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

    def _copied_from(self, model: ModelReference | None, name: str, reader: Reader) -> OutputTensor:
        """What too few models have for the method."""
        dtype = self._dtype([reader]) if reader.dtype in CODES else reader.dtype
        if self.alignment is not None and model is not None and has_row_for_each_token(name):
            reader = self.alignment.aligned(name, {model: reader})[model]
        return self._copy(name, reader, dtype)

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
        if self.on_missing == "present":
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

    # --- all of them

    def raise_problems(self) -> None:
        """Raises ModelError where tensors did not fit."""
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

    def notes(self) -> list[str]:
        """What the user should know."""
        found = [
            f"{_some(names)} not in {lacking}: merged from the other models, or copied"
            for lacking, names in self.missing.present.items()
        ]
        if self.missing.derived:
            found.append(f"{_some(self.missing.derived)} left out: not in all models, and made anew by each")
        for path, names in self.fisher.uncovered.items():
            found.append(f"{path} does not cover {_some(list(names))}: the plain weighted mean there")
        return found


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
