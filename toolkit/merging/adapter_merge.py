"""``meldkit merge`` where every model is an adapter alone: the result is an adapter, in the low-rank space."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.config.merge_command import MergeConfig
from toolkit.durable import write_json
from toolkit.errors import ConfigError
from toolkit.merging.recipes.model_inputs import is_adapter, local_folder, open_source
from toolkit.merging.recipes.parameters import converted
from toolkit.merging.recipes.recipe import InputModel, Location, MergeRecipe, Setting, Settings
from toolkit.merging.recipes.recipe_checks import notes_on_settings
from toolkit.merging.registry import merge_methods
from toolkit.merging.sources import Source
from toolkit.reporting.wording import size
from toolkit.terminal import err, out

if TYPE_CHECKING:
    from toolkit.merging.lora.output import AdapterInputs, AdapterMergeReport

# Flags that say something about a merge of adapters; the others get a note.
USED_FLAGS = {
    *("config", "out", "method", "models", "weights", "base", "param", "dtype", "tokenizer_source"),
    *("lenient", "lora_mode", "lora_rank", "transformers_cache"),
    *("dry_run", "overwrite", "quiet", "verbose", "report"),
}


def adapters_of(config: MergeConfig, recipe: MergeRecipe) -> list[Path]:
    """The folders of a recipe's models where all of them are adapters alone, else none.

    Raises:
        ModelError: a model is not there.
        ConfigError: some are adapters and others are not, or the recipe asks for what adapters cannot have.
    """
    folders = [_folder_of(entry.model.model, config) for entry in recipe.models]
    alone = [entry for entry, folder in zip(recipe.models, folders, strict=True) if is_adapter(folder)]
    if not alone:
        return []
    hint = "write BASE+ADAPTER for a model with an adapter; every method merges those"
    problems = [
        f"{entry.place}: {entry.model}: {entry.model.model} is an adapter itself, and takes no other one"
        for entry in alone
        if entry.model.loras
    ]
    if not problems and len(alone) < len(recipe.models):
        problems = [
            f"{entry.place}: {entry.model} is an adapter, and other models are not" for entry in alone
        ]
    if not problems and recipe.merge_method != "linear":
        problems = [f"{recipe.name}: adapters alone are merged by linear, not by {recipe.merge_method}"]
    if problems:
        raise ConfigError(problems, hint=hint)
    if recipe.tokenizer is not None:
        problems.append(f"{recipe.tokenizer.place}: adapters have no vocabulary that a tokenizer could align")
    if recipe.chat_template is not None:
        problems.append(f"{recipe.name}: chat_template: adapters keep that of the first one")
    if problems:
        raise ConfigError(problems, hint="leave it out, or write BASE+ADAPTER to merge whole models")
    return folders


def merge_adapters_of(config: MergeConfig, recipe: MergeRecipe, folders: list[Path], given: set[str]) -> int:
    """Merge, or with --dry-run say what would be merged, and return the exit status."""
    from toolkit.merging.lora.output import merge_inputs, read_inputs

    weights, normalize = _weights_of(recipe)
    inputs = read_inputs(
        folders,
        weights,
        config.lora_mode,
        rank=config.lora_rank,
        normalize=normalize,
        dtype=recipe.out_dtype or recipe.dtype,
        base=_base_of(config, recipe),
        lenient=config.lenient,
    )
    notes = [*_flag_notes(config, given), *recipe.notes, *notes_on_settings(recipe)]
    if config.dry_run or (config.verbose and not config.quiet):
        # After a merge the report tells the notes of its inputs.
        out(_plan_text(inputs, config, [*notes, *(inputs.notes if config.dry_run else ())]))
    elif not config.quiet:
        for note in notes:
            err(f"note: {note}")
    if config.dry_run:
        out("Dry run: nothing was written.")
        return 0
    _tell(merge_inputs(inputs, config.out, overwrite=config.overwrite), config)
    return 0


def _folder_of(location: Location, config: MergeConfig) -> Path:
    return local_folder(
        location,
        cache_folder=config.transformers_cache,
        download=not config.dry_run,
        with_code=config.trust_remote_code,
    )


def _base_of(config: MergeConfig, recipe: MergeRecipe) -> Source | None:
    """The base of the mode ``residual``, with adapters or without."""
    reference = recipe.base_model
    if reference is None:
        return None
    parts = (reference.model, *reference.loras)
    return open_source(reference, {part: _folder_of(part, config) for part in parts})


# --- parameters


def _weights_of(recipe: MergeRecipe) -> tuple[list[float], bool]:
    """The weights, and whether they are divided by their sum.

    Raises:
        ConfigError: a gradient or a filter, which only tensors of models have; or weights that add up to zero.
    """
    problems: list[str] = []
    settings = [_setting("weight", entry, recipe) for entry in recipe.models]
    weights = [_number(setting, "weight", float, 1.0, problems) for setting in settings]
    normalize = _number(recipe.parameters.get("normalize"), "normalize", bool, True, problems)
    method = merge_methods()["linear"]
    if not problems and method.check is not None:
        problem = method.check({"weight": np.array(weights), "normalize": normalize})
        place = next((setting.place for setting in settings if setting is not None), recipe.name)
        problems += [f"{place}: {problem}"] if problem else []
    if problems:
        raise ConfigError(problems)
    return weights, normalize


def _setting(name: str, entry: InputModel, recipe: MergeRecipe) -> Setting | None:
    levels: tuple[Settings, ...] = (entry.parameters, recipe.parameters)
    return next((settings[name] for settings in levels if name in settings), None)


def _number(setting: Setting | None, name: str, kind: type, otherwise: float, problems: list[str]) -> Any:
    if setting is None:
        return otherwise
    first = setting.conditions[0]
    if len(setting.conditions) > 1 or first.filter is not None or isinstance(first.value, tuple):
        problems.append(
            f"{setting.place}: {name} is one value for all of an adapter, no gradient and no filter"
        )
        return otherwise
    return converted(first.value, kind)


# --- words


def _flag_notes(config: MergeConfig, given: set[str]) -> list[str]:
    notes = []
    for name in sorted(given - USED_FLAGS):
        flag = f"--{'no-' if getattr(config, name) is False else ''}{name.replace('_', '-')}"
        notes.append(f"{flag} has no effect: the models are adapters")
    return notes


def _plan_text(inputs: "AdapterInputs", config: MergeConfig, notes: list[str]) -> str:
    lines = [f"Method   linear, of adapters: {config.lora_mode}", "Inputs"]
    for adapter, weight in zip(inputs.adapters, inputs.weights, strict=True):
        total = size(adapter.file.stat().st_size) if adapter.file is not None else ""
        lines.append(f"  adapter  {adapter.where}  {total}, rank {adapter.config.rank}, weight {weight:g}")
    if inputs.base is not None:
        total = size(sum(path.stat().st_size for path in inputs.base.files))
        lines.append(f"  base     {inputs.base.label}  {total}")
    result = "one adapter" if inputs.base is None else "one adapter and its base"
    lines.append(f"Output   {config.out}: {result}")
    return "\n".join([*lines, *(f"Note     {note}" for note in notes)])


def _tell(report: "AdapterMergeReport", config: MergeConfig) -> None:
    if config.report is not None:
        write_json(config.report, report.facts)
    if config.quiet:
        return
    for line in report.summary():
        err(line)
    out(str(report.adapter_folder))
    if report.model_folder is not None:
        out(f"{report.model_folder} (the base of the adapter)")
