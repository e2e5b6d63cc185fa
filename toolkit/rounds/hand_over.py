"""What training with merges hands over: the model of every locale, and what each model does on the compared rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from toolkit.evaluation.outcomes import RowOutcomes, metrics
from toolkit.rounds.final_model import write_final_model
from toolkit.rounds.merging import MergedModels
from toolkit.rounds.outcome_files import ITERATIVE, LAST_MERGE, OutcomeFiles
from toolkit.rounds.participants import Participant, TrainerFactory
from toolkit.rounds.run import Run
from toolkit.training.contract import ParticipantTrainer


class HandOver:
    """Writes models and outcomes of the participants of this rank.

    Args:
        run: of the recipe.
        factory: of the trainers; has tokenizer and classes.
        outcomes: receives what models do on rows.
        merged_models: of the run.
        compared: rows on which the models of each locale are compared.
    """

    def __init__(
        self,
        run: Run,
        factory: TrainerFactory,
        outcomes: OutcomeFiles,
        merged_models: MergedModels,
        compared: Mapping[str, Any],
    ) -> None:
        self._run = run
        self._factory = factory
        self._outcomes = outcomes
        self._merged_models = merged_models
        self._compared = compared

    def write_outcomes(self, arm: str, participant: Participant) -> RowOutcomes | None:
        """Evaluate a participant as it stands on its compared rows, if it has any."""
        name = participant.name
        if name not in self._compared:
            return None
        found = participant.trainer.evaluate_rows(self._compared[name])
        self._outcomes.write(arm, name, found)
        return found

    def write(self, participants: Sequence[Participant]) -> None:
        """Write final_model/ of every participant that has not failed, and the run's own. On all ranks."""
        well = [p for p in participants if p.standing.status != "failed"]
        chosen = self._chosen([p.name for p in well])
        for participant in well:
            found = self.write_outcomes(ITERATIVE, participant)
            if found is not None:
                self._write_last_merge(participant, found)
            measured = {} if found is None else metrics(found)
            run_dir = self._run.directory.path
            for folder in [run_dir / participant.name, *([run_dir] if participant.name == chosen else [])]:
                self._write_model(folder, participant, measured)

    def _chosen(self, own: Sequence[str]) -> str | None:
        """Whose model the run's final_model/ is: of the first target that trains, else of the first locale."""
        config = self._run.config
        well = {name for names in self._run.team.gather(list(own)) for name in names}
        return next((name for name in (*config.targets, *config.locales) if name in well), None)

    def _write_model(self, folder: Path, participant: Participant, measured: Mapping[str, float]) -> None:
        run = self._run
        write_final_model(
            folder,
            participant.trainer,
            self._factory.tokenizer,
            config=run.config,
            plan=run.plan,
            recipe=run.recipe,
            label_names=self._factory.label_names,
            rows=[
                ("Locale", participant.name),
                *((f"Held-out {n}", f"{v:.4f}") for n, v in measured.items()),
            ],
            processes=run.processes,
        )

    def _write_last_merge(self, participant: Participant, of_its_own: RowOutcomes) -> None:
        """What the newest merged model that was made for a participant does, taken over or not.

        Args:
            of_its_own: what the participant's model does, which is that one if it merged last and trained no more.
        """
        merges = [r for r in self._run.journal.records("merge") if participant.name in r["gate"]]
        if not merges:
            return
        paths: dict[str, str] = merges[-1]["paths"]
        name = paths.get(participant.name) or next(iter(paths.values()))
        trainer = participant.trainer
        own = trainer.state()
        merged = saved_state(self._merged_models.folder / name, trainer)
        if all(torch.equal(merged[name], tensor) for name, tensor in own.items()):
            self._outcomes.write(LAST_MERGE, participant.name, of_its_own)
            return
        trainer.load_state(merged)
        self.write_outcomes(LAST_MERGE, participant)
        trainer.load_state(own)


def saved_state(folder: Path, trainer: ParticipantTrainer) -> dict[str, Any]:
    """The state that was saved as a model folder, complete: what a folder leaves out (a second name of a tied tensor)
    is taken from the name that it is tied to, or from the trainer."""
    saved: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        saved |= load_file(path)
    own = trainer.state()
    if own.keys() <= saved.keys():
        return saved
    places = {name: tensor.data_ptr() for name, tensor in trainer.model.state_dict().items()}
    by_place = {places[name]: tensor for name, tensor in saved.items()}
    return {name: saved.get(name, by_place.get(places[name], tensor)) for name, tensor in own.items()}
