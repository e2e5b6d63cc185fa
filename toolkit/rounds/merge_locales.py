"""``meldkit merge-locales``: models of locales become one for a target language, after training."""

from pathlib import Path

from toolkit.config.load import load_for_command
from toolkit.config.merge_locales_command import MergeLocalesConfig
from toolkit.config.option_help import options_help
from toolkit.data.locale_codes import is_locale
from toolkit.errors import ConfigError, InputError
from toolkit.rounds.weighting import WeightingOptions, combined
from toolkit.terminal import out

HELP_FLAGS = {"-h", "--help", "help"}
USAGE = "meldkit merge-locales --target-lang LOCALE [--models-dir FOLDER] [--OPTION VALUE ...]"
MODEL_FILES = ("config.json", "adapter_config.json")
WRONG_INPUT = 2


def merge_locales(argv: list[str]) -> int:
    """Choose models and weights, and hand them to ``meldkit merge``; returns the exit status."""
    if not argv or HELP_FLAGS & set(argv):
        out(options_help(USAGE, MergeLocalesConfig))
        return 0 if argv else WRONG_INPUT
    config = load_for_command(MergeLocalesConfig, argv).config
    weights = weights_of(config)
    models = models_of(config.models_dir)
    for locale, weight in weights.items():
        out(f"  {locale}  {weight:.4f}  {models[locale]}")
    folder = config.out or Path(f"merged_{config.mode}_{config.target_lang}")
    words = [
        "--method",
        config.method,
        "--out",
        str(folder),
        "--models",
        *(str(models[name]) for name in weights),
    ]
    words += ["--weights", *(repr(weight) for weight in weights.values())]
    words += ["--overwrite"] * config.overwrite + ["--dry-run"] * config.dry_run
    from toolkit.merging.commands import merge

    return merge(words)


def models_of(folder: Path) -> dict[str, Path]:
    """The model of each locale in ``folder``: LOCALE/final_model, or LOCALE itself, sorted by locale.

    Raises:
        InputError: there is none.
    """
    found: dict[str, Path] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not is_locale(entry.name):
            continue
        for place in (entry / "final_model", entry):
            if any((place / name).is_file() for name in MODEL_FILES):
                found[entry.name] = place
                break
    if not found:
        raise InputError(
            f"{folder} holds no models of locales",
            hint="give --models-dir a run directory of iterative-merge, or a folder of models named by their locales",
        )
    return found


def weights_of(config: MergeLocalesConfig) -> dict[str, float]:
    """The weight of each locale whose model is merged, of sum 1, the largest first.

    Raises:
        InputError, ConfigError: too few models, unknown languages, or weights that do not fit.
    """
    locales = list(models_of(config.models_dir))
    if not config.include_target:
        locales = [locale for locale in locales if locale != config.target_lang]
    if len(locales) < 2:
        raise InputError(
            f"{config.models_dir}: a merge needs two models besides that of {config.target_lang}"
        )
    if config.num_languages is not None and config.mode != "similarity":
        raise ConfigError(["--num-languages chooses by similarity, so it needs --mode similarity"])
    if config.num_languages is not None and config.num_languages > len(locales):
        raise ConfigError([f"--num-languages {config.num_languages}, and there are {len(locales)} models"])
    if bool(config.manual_weights) != (config.mode == "manual"):
        raise ConfigError(["--manual-weights and --mode manual belong together"])
    if unknown := sorted(set(config.manual_weights) - set(locales)):
        raise ConfigError([f"--manual-weights: there is no model of {', '.join(unknown)}"])
    if config.mode == "manual":
        locales = [locale for locale in locales if locale in config.manual_weights]
    found = combined(
        config.mode,
        locales,
        [config.target_lang],
        num_examples={},
        options=WeightingOptions(
            similarity_features=config.similarity_features,
            similarity_top_k=config.num_languages,
            manual_weights=config.manual_weights,
        ),
    )
    used = {locale: weight for locale, weight in found.items() if weight > 0}
    return dict(sorted(used.items(), key=lambda entry: -entry[1]))
