"""Whether the local files that a configuration names are there: asked before anything heavy is imported."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from toolkit.config.iterative_rules import LOCALE_PLACEHOLDER
from toolkit.config.names import nearest
from toolkit.config.recipes import IterativeConfig
from toolkit.config.shipped import shipped_file
from toolkit.errors import DataError, InputError, ModelError
from toolkit.paths import can_only_be_a_path

DATA_OPTIONS = ("data", "eval_data")
MODEL_OPTIONS = ("model", "tokenizer")
FILE_OPTIONS = ("chat_template",)


def named_sources(config: object) -> Iterator[tuple[str, str]]:
    """Yield option and value of every source that a configuration names; where the value has a place for a locale,
    once for each."""
    for name in (*DATA_OPTIONS, *MODEL_OPTIONS, *FILE_OPTIONS):
        source = getattr(config, name, None)
        if source is None:
            continue
        if name in DATA_OPTIONS and isinstance(config, IterativeConfig) and LOCALE_PLACEHOLDER in source:
            for locale in dict.fromkeys([*config.locales, *config.targets]):
                yield name, getattr(config.for_locale(locale), name)
        else:
            yield name, str(source)


def missing_files(config: object) -> list[tuple[str, str]]:
    """Return option and path of every local file or folder that a configuration names and that is not
    there."""
    return [
        (name, source)
        for name, source in named_sources(config)
        if not Path(source).expanduser().exists() and (name in FILE_OPTIONS or can_only_be_a_path(source))
    ]


def check_files(config: BaseModel, recipe: str) -> None:
    """Raise one error that names every missing file.

    Args:
        recipe: its name, for the advice.

    Raises:
        DataError, ModelError, InputError: by what is missing first.
    """
    missing = missing_files(config)
    if not missing:
        return
    lines = [f"{name}: there is no {path}{_neighbour(path)}" for name, path in missing]
    names = [name for name, _ in missing]
    if names[0] in DATA_OPTIONS:
        config_flag = f"--config {recipe} " if shipped_file(recipe) else ""
        hint = (
            "without --data and --eval-data the sample intents are taken (meldkit data samples)"
            if isinstance(config, IterativeConfig)
            else "meldkit data samples conversations --out sample_data makes data to try; then "
            f"meldkit train {recipe} {config_flag}--data sample_data --eval-data none"
        )
        raise DataError("\n  ".join(lines), hint=hint)
    if names[0] in MODEL_OPTIONS:
        hint = "meldkit models makes sample models; --model takes a hub id, a folder or a .gguf file"
        raise ModelError("\n  ".join(lines), hint=hint)
    raise InputError("\n  ".join(lines))


def _neighbour(path: str) -> str:
    folder = Path(path).expanduser().parent
    if not folder.is_dir():
        return ""
    match = nearest(Path(path).name, sorted(p.name for p in folder.iterdir()))
    return f"; did you mean '{Path(path).parent / match}'?" if match else ""
