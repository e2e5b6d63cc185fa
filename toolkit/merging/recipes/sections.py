"""From a recipe to the tensors of the result: which models each is merged from, under which name, at which depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.errors import ModelError
from toolkit.merging.recipes.model_inputs import ModelInput
from toolkit.merging.recipes.parameters import Levels
from toolkit.merging.recipes.recipe import (
    InputModel,
    MergeRecipe,
    ModelReference,
    OutputModule,
    OutputSlice,
    Settings,
)
from toolkit.merging.recipes.recipe_checks import merged_entries, split_base
from toolkit.merging.recipes.slices import LayerList, Layers, is_before_layers, with_layers
from toolkit.merging.registry import MergeMethod

# What recipes call the parts of models with several, and the parts of tensor names that this means.
MODULE_NAMES = {
    "text_decoder": ("language_model", "text_model", "llm"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_tower", "vision_model", "visual"),
}
# Modules that take what no other module takes.
REST = ("default", "text_decoder")

Inputs = Mapping[ModelReference, ModelInput]


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """One tensor of the result.

    Attributes:
        name: in the result.
        own_names: in each model of the section.
        base_name: in the base.
        t: depth.
    """

    name: str
    own_names: tuple[str, ...]
    base_name: str
    t: float


@dataclass(frozen=True)
class Section:
    """Tensors of the result that are merged from the same models.

    Attributes:
        models: K models.
        base: theta_0, where the method has one that is not one of the K.
        levels: where parameters are looked for.
        requests: the tensors.
    """

    models: tuple[ModelReference, ...]
    base: ModelReference | None
    levels: Levels
    requests: list[TensorRequest]


def donor_of(recipe: MergeRecipe) -> ModelReference:
    """The model whose configuration and tokenizer the result gets, unless the recipe says otherwise."""
    return recipe.base_model or recipe.references()[0]


def sections_of(
    recipe: MergeRecipe, method: MergeMethod, inputs: Inputs
) -> tuple[list[Section], dict[str, Any], list[str]]:
    """All of a recipe.

    Returns:
        The sections in the order of the output; config.json with the number of layers of the result; notes.

    Raises:
        ModelError: layers or modules that a recipe names are not there.
    """
    planner = _Planner(recipe, method, inputs)
    if recipe.modules:
        sections = planner.modules()
    elif recipe.slices:
        sections = planner.slices(recipe.slices, (recipe.parameters,), None, None)
    else:
        sections = [planner.models(recipe.models, (recipe.parameters,), None)]
    return sections, planner.config, planner.notes


class _Planner:
    def __init__(self, recipe: MergeRecipe, method: MergeMethod, inputs: Inputs) -> None:
        self.recipe = recipe
        self.method = method
        self.inputs = inputs
        self.donor = inputs[donor_of(recipe)]
        self.config: dict[str, Any] = dict(self.donor.config)
        self.notes: list[str] = []

    # --- whole models

    def models(
        self, entries: Sequence[InputModel], upper: tuple[Settings, ...], only: set[str] | None
    ) -> Section:
        entries = merged_entries(self.method, self.recipe, entries)
        settings = {entry.model: (entry.parameters, *upper) for entry in entries}
        section = self.section([entry.model for entry in entries], settings, upper, self.recipe.base_model)
        names: dict[str, None] = {}
        for reference in self.in_order(section):
            names |= dict.fromkeys(self.inputs[reference].names)
        layers = self.inputs[next(iter(self.in_order(section)))].layers
        for name in names:
            if only is None or name in only:
                own = (name,) * len(section.models)
                section.requests.append(TensorRequest(name, own, name, layers.depth(name)))
        return section

    def section(
        self,
        references: Sequence[ModelReference],
        settings: Mapping[ModelReference, tuple[Settings, ...]],
        shared: tuple[Settings, ...],
        base: ModelReference | None,
    ) -> Section:
        """A section without tensors: which of the models are merged, and the base."""
        indexes, base = split_base(self.method, references, base)
        models = [references[index] for index in indexes]
        if base is not None and self.method.base_is_a_model:
            models, base = [base, *models], None
        own = tuple(settings.get(model, shared) for model in models)
        return Section(tuple(models), base, Levels(shared, own), [])

    def in_order(self, section: Section) -> list[ModelReference]:
        """The models of a section, first the one whose order of tensors the result follows."""
        references = [*section.models, *([section.base] if section.base else [])]
        return sorted(references, key=lambda reference: reference != self.donor.reference)

    # --- slices

    def slices(
        self,
        slices: Sequence[OutputSlice],
        upper: tuple[Settings, ...],
        only: set[str] | None,
        module: str | None,
    ) -> list[Section]:
        layers = {model: self.layers_of(model, only) for part in slices for model in self.models_of(part)}
        donor = layers.get(self.donor.reference) or next(iter(layers.values()))
        out = self.main(donor, self.donor.reference)
        sections, origins, offset = [], [], 0
        for part in slices:
            section = self.slice_section(part, upper)
            sections.append(section)
            starts = self.starts(part, section)
            for model in starts:
                self.check_range(part, model, layers[model])
            for layer in range(part.num_layers):
                at = {model: start + layer for model, start in starts.items()}
                t = layer / (part.num_layers - 1) if part.num_layers > 1 else 1.0
                section.requests.extend(self.layer(section, layers, at, out, offset + layer, t))
                first = part.sources[0]
                origins.append((self.inputs[first.model].config, first.start + layer))
            offset += part.num_layers
        before, behind = self.outside(slices, layers, upper, only)
        self.config, notes = with_layers(self.config, out.num_layers, origins, module)
        self.notes += notes
        return [before, *sections, behind]

    def models_of(self, part: OutputSlice) -> list[ModelReference]:
        return [source.model for source in part.sources]

    def layers_of(self, model: ModelReference, only: set[str] | None) -> "_LayerIndex":
        names = self.inputs[model].names
        if only is not None:
            names = [name for name in names if name in only]
        return _LayerIndex(names, Layers(names, self.inputs[model].config))

    def main(self, layers: "_LayerIndex", reference: ModelReference) -> LayerList:
        if layers.main is None:
            raise ModelError(f"{reference} has no numbered layers that slices could be cut from")
        return layers.main

    def slice_section(self, part: OutputSlice, upper: tuple[Settings, ...]) -> Section:
        shared = (part.parameters, *upper)
        settings = {source.model: (source.parameters, *shared) for source in part.sources}
        base = part.base_model or self.recipe.base_model
        section = self.section(self.models_of(part), settings, shared, base)
        needed = [*section.models, *([section.base] if section.base else [])]
        if missing := [model for model in needed if model not in settings]:
            raise ModelError(
                f"{part.place}: the base model {missing[0]} is not among the sources of this slice"
            )
        return section

    def starts(self, part: OutputSlice, section: Section) -> dict[ModelReference, int]:
        needed = {*section.models, *([section.base] if section.base else [])}
        return {source.model: source.start for source in part.sources if source.model in needed}

    def check_range(self, part: OutputSlice, model: ModelReference, layers: "_LayerIndex") -> None:
        source = next(source for source in part.sources if source.model == model)
        found = self.main(layers, model)
        if source.stop > found.num_layers:
            raise ModelError(
                f"{source.place}: layer_range [{source.start}, {source.stop}]: {model} has {found.num_layers} layers"
            )

    def layer(
        self,
        section: Section,
        layers: Mapping[ModelReference, "_LayerIndex"],
        at: Mapping[ModelReference, int],
        out: LayerList,
        number: int,
        t: float,
    ) -> list[TensorRequest]:
        """One layer of the result; ``at`` is the layer of each model, ``number`` that of the result."""
        rests: dict[str, None] = {}
        for model, layer in at.items():
            rests |= dict.fromkeys(layers[model].rests.get(layer, ()))
        lists = {model: self.main(layers[model], model) for model in at}
        return [
            TensorRequest(
                out.name(number, rest),
                tuple(lists[model].name(at[model], rest) for model in section.models),
                lists[section.base].name(at[section.base], rest) if section.base else "",
                t,
            )
            for rest in rests
        ]

    def outside(
        self,
        slices: Sequence[OutputSlice],
        layers: Mapping[ModelReference, "_LayerIndex"],
        upper: tuple[Settings, ...],
        only: set[str] | None,
    ) -> tuple[Section, Section]:
        """What is outside of the layers: embeddings of the first slice's models, norm and head of the last one's."""
        sections = []
        for part, are_before in ((slices[0], True), (slices[-1], False)):
            section = self.slice_section(part, upper)
            names: dict[str, None] = {}
            for model in self.in_order(section):
                names |= dict.fromkeys(layers[model].outside)
            for name in names:
                if is_before_layers(name) == are_before:
                    own = (name,) * len(section.models)
                    section.requests.append(TensorRequest(name, own, name, self.donor.layers.depth(name)))
            sections.append(section)
        return sections[0], sections[1]

    # --- modules

    def modules(self) -> list[Section]:
        names = [name for model in self.inputs.values() for name in model.names]
        taken = self.names_of_modules(dict.fromkeys(names))
        sections = []
        for name, module in self.recipe.modules.items():
            upper = (module.parameters, self.recipe.parameters)
            sections += self.module(name, module, upper, taken[name])
        return sections

    def module(
        self, name: str, module: OutputModule, upper: tuple[Settings, ...], only: set[str]
    ) -> list[Section]:
        if module.slices:
            return self.slices(module.slices, upper, only, name)
        return [self.models(module.models, upper, only)]

    def names_of_modules(self, names: Mapping[str, None]) -> dict[str, set[str]]:
        modules = list(self.recipe.modules)
        rest = next((name for name in modules if name in REST), None)
        words = {word: module for module in modules for word in MODULE_NAMES.get(module, (module,))}
        taken: dict[str, set[str]] = {module: set() for module in modules}
        for name in names:
            module = next((words[part] for part in name.split(".") if part in words), rest)
            if module is None:
                raise ModelError(
                    f"no module of the recipe takes the tensor {name}; it has {', '.join(modules)}",
                    hint="a module takes the tensors that have its name as a part of theirs; 'default' takes the rest",
                )
            taken[module].add(name)
        empty = [module for module in modules if not taken[module]]
        if empty:
            parts = sorted({part for name in names for part in name.split(".")[:2] if not part.isdecimal()})
            raise ModelError(f"modules: no tensor belongs to '{empty[0]}'; parts are {', '.join(parts[:12])}")
        return taken


class _LayerIndex:
    """The tensors of a model by layer."""

    def __init__(self, names: Sequence[str], layers: Layers) -> None:
        self.main = layers.main
        self.rests: dict[int, list[str]] = {}
        self.outside: list[str] = []
        for name in names:
            place = layers.in_main(name)
            if place is None:
                self.outside.append(name)
            else:
                self.rests.setdefault(place[0], []).append(place[1])
