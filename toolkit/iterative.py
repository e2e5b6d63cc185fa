"""Iterative training and merging from Python: what ``meldkit train iterative-merge`` does, as classes.

    from toolkit import IterativeTrainingOrchestrator, create_default_config

    config = create_default_config(["en-US", "fr-FR"], max_epochs=2, merge_frequency=1, output_dir="run")
    run = IterativeTrainingOrchestrator(config).train()
    run.final_statistics()["verdicts"]

One line registers a merge method (``toolkit.merge_method``), a weighting (``toolkit.weighting``) or a schedule
(``toolkit.schedule``) of your own; its name is then a value of ``merge_algorithm``, ``weight_calculation`` or
``schedule``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from toolkit.config.iterative_options import (
    ComparisonOptions,
    FisherOptions,
    MergeOptions,
    RobustnessOptions,
    ScheduleOptions,
    WeightOptions,
)
from toolkit.config.load import validated
from toolkit.config.options import (
    AdapterOptions,
    DataOptions,
    ModelOptions,
    QuantizationOptions,
    TrainingOptions,
)
from toolkit.config.recipes import IterativeConfig
from toolkit.errors import MeldkitError, RunDirectoryError

RECIPE = "iterative-merge"

IterativeOrchestratorConfig = IterativeConfig
"""All options of a run, by the names of the command line; validated together."""


class IterativeTrainingConfig(
    ModelOptions, AdapterOptions, QuantizationOptions, DataOptions, TrainingOptions
):
    """The options with which every locale is trained; those that are not given are the recipe's."""

    is_part: ClassVar[bool] = True

    model: str = IterativeConfig.model_fields["model"].default
    data: str = IterativeConfig.model_fields["data"].default


class IterativeMergeConfig(
    MergeOptions, WeightOptions, FisherOptions, ScheduleOptions, RobustnessOptions, ComparisonOptions
):
    """The options of merges: schedule, algorithm, weights, safety, comparison."""

    is_part: ClassVar[bool] = True


def create_default_config(
    locales: Sequence[str],
    *,
    training: IterativeTrainingConfig | None = None,
    merge: IterativeMergeConfig | None = None,
    **options: Any,
) -> IterativeConfig:
    """A run's configuration: the recipe's defaults, and what is given in their place.

    Args:
        locales: that are trained.
        training, merge: groups of options; only what was set in them counts.
        **options: single options, by the names of the command line; they win.

    Raises:
        ConfigError: all that is wrong with them.
    """
    values: dict[str, Any] = {}
    for group in (training, merge):
        if group is not None:
            values |= group.model_dump(exclude_unset=True)
    return validated(IterativeConfig, values | options | {"locales": list(locales)})


class IterativeTrainingOrchestrator:
    """Runs a configuration: trains, merges, compares, writes the run directory.

    Args:
        config: of the run, e.g. of :func:`create_default_config`.
    """

    def __init__(self, config: IterativeConfig) -> None:
        self.config = config

    def train(self, *, resume: bool = False) -> "TrainingStateManager":
        """Train to the end and return what the run has left.

        With several processes they are launched, as the command line does.

        Args:
            resume: continue the run in ``output_dir`` from its last commit.

        Raises:
            MeldkitError: of the kinds in ``toolkit.errors``.
        """
        from toolkit.cli.train import run_config

        status = run_config(RECIPE, self.config.model_copy(update={"resume": resume}))
        if status:
            raise MeldkitError(f"the run in {self.config.output_dir} ended with status {status}")
        return TrainingStateManager(self.config.output_dir)


class TrainingStateManager:
    """What a run directory holds: standings, checkpoints, merges, statistics. It changes nothing.

    Args:
        run_dir: of a run, over or not.

    Raises:
        RunDirectoryError: there is no run.
    """

    def __init__(self, run_dir: str | Path) -> None:
        from toolkit.rounds.journal import JOURNAL_NAME, Journal

        self.run_dir = Path(run_dir)
        if not (self.run_dir / JOURNAL_NAME).is_file():
            raise RunDirectoryError(f"{self.run_dir} holds no run")
        self._journal = Journal(self.run_dir, writable=False)

    @property
    def locales(self) -> list[str]:
        return list(self.config()["locales"])

    @property
    def is_finished(self) -> bool:
        return bool(self._journal.records("finished"))

    def config(self) -> dict[str, Any]:
        """The options of the run, as it was started."""
        return self._journal.records("created")[0]["config"]

    def last_commit(self) -> dict[str, Any] | None:
        """The last state from which the run could go on: epoch, and steps, checkpoints and standings by locale."""
        commits = [record for record in self._journal.records("loop") if record["loop"] == "training"]
        return commits[-1] if commits else None

    def checkpoint(self, locale: str) -> Path | None:
        """The folder of a locale's last committed checkpoint, after comparing its files with what was committed.

        Raises:
            CheckpointError: a file is missing or changed.
        """
        from toolkit.durable import verify_folder

        commit = self.last_commit()
        name = None if commit is None else commit["checkpoints"].get(locale)
        if name is None:
            return None
        folder = self.run_dir / locale / "checkpoints" / name
        verify_folder(folder)
        return folder

    def merges(self) -> list[dict[str, Any]]:
        """Every merge: epoch, weights, verdicts of the gate, metrics before and after, digests."""
        return self._journal.records("merge")

    def decisions(self) -> list[dict[str, Any]]:
        """What the schedule decided after every epoch, and why."""
        return self._journal.records("decision")

    def merged_models(self) -> list[Path]:
        """The folders of the merged models that are kept, oldest first."""
        folder = self.run_dir / "merged_models"
        recorded = [folder / record["path"] for record in self._journal.records("merged_model")]
        return [path for path in recorded if path.is_dir()]

    def final_statistics(self) -> Mapping[str, Any]:
        """The content of final_statistics.json, with the comparison once the run is over."""
        return self._read("final_statistics.json")

    def summary(self) -> Mapping[str, Any]:
        """The content of state_summary.json."""
        return self._read("state_summary.json")

    def _read(self, name: str) -> Mapping[str, Any]:
        path = self.run_dir / name
        if not path.is_file():
            raise RunDirectoryError(f"{path} is not there yet")
        return json.loads(path.read_text(encoding="utf-8"))
