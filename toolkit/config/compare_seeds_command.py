"""The options of ``meldkit compare-seeds``."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from toolkit.config.options import Options


class CompareSeedsConfig(Options):
    """Did merging while training help, over several runs of iterative-merge that differ in their seed alone? One table,
    whose intervals cover what another seed would change."""

    runs: list[Path] = Field(min_length=2)
    """Run directories, finished, with baselines: A,B or, in place of the flag, meldkit compare-seeds A B."""

    metric: Literal["auto", "accuracy", "f1", "loss"] = "auto"
    """What is compared. auto: as in the runs."""

    bootstrap_samples: int = Field(2000, ge=100)
    """Samples of the bootstrap over rows and seeds."""

    seed: int = Field(42, ge=0)
    """Of the bootstrap."""

    out: Path | None = None
    """A JSON file for the comparison, with the metric of every run."""
