"""``meldkit merge`` where every model is an adapter alone: the result is an adapter, in the low-rank space."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.config.merge_command import MergeConfig
from toolkit.durable import write_json
from toolkit.errors import ConfigError
from toolkit.merging.recipes.model_inputs import local_folder
from toolkit.merging.recipes.parameters import evaluate
from toolkit.merging.recipes.recipe import InputModel, MergeRecipe, ModelReference, Settings
from toolkit.reporting.wording import size
from toolkit.terminal import err, out

if TYPE_CHECKING:
    from toolkit.merging.lora.output import AdapterMergeReport

# Flags that say something about a merge of adapters; the others get a note.
USED_FLAGS = {
    *(
        "config",
        "out",
        "method",
        "models",
        "weights",
        "base",
        "param",
        "dtype",
        "lenient",
        "lora_mode",
        "lora_rank",
    ),
    *("dry_run", "overwrite", "quiet", "verbose", "report", "transformers_cache"),
}


def adapters_of(recipe: MergeRecipe) -> list[InputModel]:
    """The models of a recipe where all of them are adapters alone, else none.

    Raises:
        ConfigError: some are adapters and others are not, or the method is not one that adapters can be merged by.
    """
    alone = [entry for entry in recipe.models if is_adapter(entry.model)]
    if not alone:
        return []
    hint = "write BASE+ADAPTER for a model with an adapter; every method merges those"
    if len(alone) < len(recipe.models):
        raise ConfigError(
            [f"{entry.place}: {entry.model} is an adapter, and other models are not" for entry in alone],
            hint=hint,
        )
    if recipe.merge_method != "linear":
        raise ConfigError(
            [f"{recipe.name}: adapters alone are merged by linear, not by {recipe.merge_method}"], hint=hint
        )
    return alone


def is_adapter(reference: ModelReference) -> bool:
    folder = Path(reference.model.path).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def merge_adapters_of(
    config: MergeConfig, recipe: MergeRecipe, entries: Sequence[InputModel], given: set[str]
) -> int:
    """Merge, or with --dry-run say what would be merged, and return the exit status."""
    from toolkit.merging.lora.output import merge_adapters

    weights = [number_of(entry.parameters, recipe, "weight") for entry in entries]
    normalize = bool(number_of({}, recipe, "normalize", kind=bool, otherwise=True))
    folders = [local_folder(entry.model.model) for entry in entries]
    if not config.quiet:
        for name in sorted(given - USED_FLAGS):
            err(f"note: --{name.replace('_', '-')} has no effect: the models are adapters")
    if config.dry_run:
        for folder, weight in zip(folders, weights, strict=True):
            total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            out(f"adapter  {folder}  {size(total)}, weight {weight:g}")
        out(f"Output   {config.out}: one adapter by {config.lora_mode}\nDry run: nothing was written.")
        return 0
    base = recipe.base_model and local_folder(recipe.base_model.model)
    report = merge_adapters(
        folders,
        weights,
        config.out,
        config.lora_mode,
        rank=config.lora_rank,
        normalize=normalize,
        dtype=recipe.out_dtype or recipe.dtype,
        base=base,
        lenient=config.lenient,
        overwrite=config.overwrite,
    )
    _tell(report, config)
    return 0


def number_of(
    own: Settings, recipe: MergeRecipe, name: str, *, kind: type = float, otherwise: float = 1.0
) -> float:
    """A parameter of one adapter: one value, as adapters have no depth that gradients could follow."""
    for settings in (own, recipe.parameters):
        setting = settings.get(name)
        if setting is not None:
            value = evaluate(setting, "", 0.0, kind)
            if value is not None:
                return value
    return otherwise


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
