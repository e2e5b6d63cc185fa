"""Compare a recipe with its merge method before any model is looked at: names, values, number of models, base."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolkit.config.names import did_you_mean
from toolkit.merging.recipes.parameters import FISHER, NEEDLESS, converted, parameters_of
from toolkit.merging.recipes.recipe import (
    FISHER_SETTINGS,
    InputModel,
    MergeRecipe,
    ModelReference,
    OutputSlice,
    Setting,
    Settings,
)
from toolkit.merging.registry import REQUIRED, MergeMethod, Parameter, merge_methods

# The place of a model that stands in no list.
BASE = "base_model"


def check_settings(recipe: MergeRecipe) -> tuple[list[str], list[str]]:
    """Compare a recipe with its method, before any model is looked at.

    Returns:
        What nothing would read (wrong names, parameters at a level where they have no meaning); and what is wrong
        (values, missing parameters, number of models, base).
    """
    method = merge_methods().get(recipe.merge_method)
    if method is None:
        return [], []
    unknown: list[str] = []
    wrong: list[str] = []
    known = parameters_of(method)
    for settings, is_of_model in _settings_with_level(recipe):
        for name, setting in settings.items():
            if name in NEEDLESS:
                continue
            if name not in known:
                unknown.append(f"{setting.place}: {_unknown_parameter(name, method)}")
            elif is_of_model and not known[name].per_model:
                text = f"'{name}' is one value for all models; it belongs under the 'parameters:' beside merge_method"
                unknown.append(f"{setting.place}: {text}")
            else:
                wrong += _wrong_values(known[name], setting)
    for slice_, models, levels, place in _merges(recipe, method):
        wrong += [f"{place}: {text}" for text in _wrong_models(method, recipe, slice_, models)]
        base = (slice_.base_model if slice_ else None) or recipe.base_model
        wrong += _missing_parameters(method, models, levels, place, base)
    return unknown, list(dict.fromkeys(wrong))


def notes_on_settings(recipe: MergeRecipe) -> list[str]:
    """What stands in a recipe and is not needed here."""
    places = {n: s[n].place for s in recipe.settings() for n in NEEDLESS if n in s}
    return [f"{place}: {name} has no effect: {NEEDLESS[name]}" for name, place in places.items()]


def split_base(
    method: MergeMethod, models: Sequence[ModelReference], base: ModelReference | None
) -> tuple[list[int], ModelReference | None]:
    """Which of ``models`` are merged beside the base, and the base that the method uses.

    A method without a base merges all of them. The base may be listed among the models or not.
    """
    if method.base == "none" or base is None:
        return list(range(len(models))), None
    return [index for index, model in enumerate(models) if model != base], base


def merged_entries(
    method: MergeMethod, recipe: MergeRecipe, entries: Sequence[InputModel]
) -> tuple[InputModel, ...]:
    """The models of a list; a method without a base merges base_model too, listed or not, as mergekit does."""
    base = recipe.base_model
    if not entries or base is None or method.base != "none" or base in [entry.model for entry in entries]:
        return tuple(entries)
    return (*entries, InputModel(base, {}, BASE))


def _settings_with_level(recipe: MergeRecipe) -> Iterator[tuple[Settings, bool]]:
    yield recipe.parameters, False
    for entry in recipe.models:
        yield entry.parameters, True
    for module in recipe.modules.values():
        yield module.parameters, False
        for entry in module.models:
            yield entry.parameters, True
    for slice_ in [*recipe.slices, *(s for module in recipe.modules.values() for s in module.slices)]:
        yield slice_.parameters, False
        for source in slice_.sources:
            yield source.parameters, True


@dataclass(frozen=True, slots=True)
class _Input:
    """One model of a list that is merged, with the levels of its parameters."""

    model: ModelReference
    levels: tuple[Settings, ...]
    place: str


# A slice where it is one, its models, the levels of shared parameters, the place.
_Merge = tuple[OutputSlice | None, list[_Input], tuple[Settings, ...], str]


def _merges(recipe: MergeRecipe, method: MergeMethod) -> Iterator[_Merge]:
    """Every list of models that is merged: its slice, models with their levels, shared levels, place."""
    parts = [(recipe.models, recipe.slices, {}, recipe.name)]
    parts += [(m.models, m.slices, m.parameters, m.place) for m in recipe.modules.values()]
    for models, slices, settings, place in parts:
        upper: tuple[Settings, ...] = (settings, recipe.parameters)
        if models:
            yield (
                None,
                [
                    _Input(entry.model, (entry.parameters, *upper), entry.place)
                    for entry in merged_entries(method, recipe, models)
                ],
                upper,
                place,
            )
        for slice_ in slices:
            shared = (slice_.parameters, *upper)
            sources = [
                _Input(source.model, (source.parameters, *shared), source.place) for source in slice_.sources
            ]
            yield slice_, sources, shared, slice_.place


def _unknown_parameter(name: str, method: MergeMethod) -> str:
    others = [other.name for other in merge_methods().values() if name in parameters_of(other)]
    if others:
        return f"{method.name} has no parameter '{name}' ({', '.join(others[:3])} {'have' if others[1:] else 'has'} it)"
    return f"{method.name} has no parameter '{name}'{did_you_mean(name, parameters_of(method))}"


def _wrong_values(parameter: Parameter, setting: Setting) -> list[str]:
    found = []
    for condition in setting.conditions:
        for value in condition.value if isinstance(condition.value, tuple) else (condition.value,):
            try:
                parameter.check(converted(value, parameter.kind))
            except ValueError as error:
                found.append(f"{setting.place}: {parameter.name}: {error}")
    return found


def _wrong_models(
    method: MergeMethod,
    recipe: MergeRecipe,
    slice_: OutputSlice | None,
    models: Sequence[_Input],
) -> list[str]:
    references = [entry.model for entry in models]
    wanted = (slice_.base_model if slice_ else None) or recipe.base_model
    others, base = split_base(method, references, wanted)
    if method.base == "required" and base is None:
        what = (
            "the model that t = 0 stands for"
            if method.base_is_a_model
            else "the model that deltas are taken from"
        )
        return [f"{method.name} needs base_model, {what}"]
    repeated = {str(model) for model in references if references.count(model) > 1}
    problems = [f"{model} is given twice" for model in sorted(repeated)]
    fewest, most = method.num_models
    if not fewest <= len(others) <= (most or len(others)):
        count = (
            str(fewest) if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        )
        beside = " beside base_model" if base is not None else ""
        added = " with base_model" if models and models[-1].place == BASE else ""
        problems.append(
            f"{method.name} takes {count} model{'' if count == '1' else 's'}{beside}, not {len(others)}{added}"
        )
    return problems


def _missing_parameters(
    method: MergeMethod,
    models: Sequence[_Input],
    shared: tuple[Settings, ...],
    place: str,
    base: ModelReference | None,
) -> list[str]:
    required = [
        p for p in (*method.parameters, *([FISHER] if method.needs_fisher else [])) if p.default is REQUIRED
    ]
    problems = []
    for parameter in required:
        if not parameter.per_model and not _is_set(parameter, shared):
            problems.append(f"{place}: {method.name} needs the parameter '{parameter.name}'")
        for entry in models:
            is_base = method.base != "none" and entry.model == base
            if not parameter.per_model or is_base or _is_set(parameter, entry.levels):
                continue
            if entry.place == BASE:
                problems.append(
                    f"{place}: base_model {entry.model} is merged too, as {method.name} has no base, and has no "
                    f"'{parameter.name}'; list it among the models with one, or leave base_model out"
                )
            else:
                problems.append(
                    f"{entry.place}: {method.name} needs the parameter '{parameter.name}' for {entry.model}"
                )
    return problems


def _is_set(parameter: Parameter, scopes: Sequence[Settings]) -> bool:
    names = FISHER_SETTINGS if parameter is FISHER else (parameter.name,)
    return any(name in settings for name in names for settings in scopes)
