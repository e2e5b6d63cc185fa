"""``merged_models/``: every merge as a model that transformers or PEFT load; the newest ones are kept."""

import contextlib
import copy
import itertools
import shutil
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from toolkit.durable import STAGING_PREFIX, clear_leftovers, commit_folder, discard_folder, write_json
from toolkit.errors import MergeError
from toolkit.merging.lora.adapter_file import WEIGHTS_NAME
from toolkit.rounds.journal import Journal

FOLDER_NAME = "merged_models"
RECORD_NAME = "merge_record.json"
# Names of participants in a folder's name; more of them would not fit into one.
MAX_NAMES = 6


class MergedModels:
    """The merged models of a run; where participants are spread over ranks, each rank may add some.

    Args:
        run_dir: the run directory.
        journal: of the run.
        keep: how many rounds of merges are kept; of a round all models, also where each participant has its own.
    """

    def __init__(self, run_dir: Path, journal: Journal, *, keep: int) -> None:
        self.folder = run_dir / FOLDER_NAME
        self._journal, self._keep = journal, keep

    def add(
        self,
        state: Mapping[str, Tensor],
        *,
        round_number: int,
        participants: Sequence[str],
        model: Any,
        adapter_config: Any,
        tokenizer: Any,
        record: Mapping[str, Any],
    ) -> Path:
        """Write a merged model durably, record it, and delete models of rounds that are no longer kept.

        Args:
            state: the merged tensors.
            round_number: of the merge.
            participants: that were merged, for the folder's name.
            model: for the configuration: the participants' model, or their PeftModel.
            adapter_config: PEFT's LoraConfig where ``state`` is an adapter.
            tokenizer: saved beside it.
            record: JSON values about the merge: merge_record.json.

        Returns:
            The folder.

        Raises:
            MergeError: the disk is full or fails; what was there before is untouched.
        """
        final = self._free_name(participants)
        num_bytes = write_merged_model(
            final, state, model=model, adapter_config=adapter_config, tokenizer=tokenizer, record=record
        )
        self._journal.append("merged_model", round=round_number, path=final.name, num_bytes=num_bytes)
        self._delete_old()
        return final

    def present(self) -> list[Path]:
        """The folders that are there and that the journal knows, oldest first."""
        paths = [self.folder / record["path"] for record in self._known()]
        return [path for path in paths if path.is_dir()]  # a journal that was rewound may know deleted ones

    def recover(self) -> None:
        """Remove what a killed process left behind, and models that the journal does not know. On one process."""
        clear_leftovers(self.folder)
        if not self.folder.is_dir():
            return
        known = {path.name for path in self.present()}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in known:
                discard_folder(folder)

    def _known(self) -> list[dict[str, Any]]:
        deleted = {record["path"] for record in self._journal.records("merged_model_deleted")}
        return [r for r in self._journal.records("merged_model") if r["path"] not in deleted]

    def _delete_old(self) -> None:
        rounds = sorted({record["round"] for record in self._known()})
        for record in self._known():
            if record["round"] in rounds[: -self._keep]:
                # The journal first: a folder that it no longer knows is removed by recover(), never handed out.
                self._journal.append("merged_model_deleted", round=record["round"], path=record["path"])
                with contextlib.suppress(FileNotFoundError):  # another rank was first
                    discard_folder(self.folder / record["path"])

    def _free_name(self, participants: Sequence[str]) -> Path:
        taken = {record["path"] for record in self._journal.records("merged_model")}
        name = folder_name(participants, datetime.now(UTC))
        names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        return next(self.folder / n for n in names if n not in taken and not (self.folder / n).exists())


def folder_name(participants: Sequence[str], time: datetime) -> str:
    """``iterative_merge_en-US_fr-FR_20231214_143022``; of a long list the first names and how many more there are."""
    names = list(participants)
    if len(names) > MAX_NAMES:
        names = [*names[: MAX_NAMES - 1], f"and-{len(names) - MAX_NAMES + 1}-more"]
    return f"iterative_merge_{'_'.join(names)}_{time:%Y%m%d_%H%M%S}"


def write_merged_model(
    final: Path,
    state: Mapping[str, Tensor],
    *,
    model: Any,
    adapter_config: Any,
    tokenizer: Any,
    record: Mapping[str, Any],
) -> int:
    """Write the folder ``final`` whole: weights, configuration, tokenizer and merge_record.json.

    Args:
        final: must not exist.
        state, model, adapter_config, tokenizer, record: as of :meth:`MergedModels.add`.

    Returns:
        Its size in bytes.

    Raises:
        MergeError: the disk is full or fails; ``final`` then does not exist.
    """
    staged = final.with_name(f"{STAGING_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}")
    try:
        staged.mkdir(parents=True)
        if adapter_config is None:
            model.save_pretrained(str(staged), state_dict=dict(state))
        else:
            _write_adapter(staged, state, model, adapter_config)
        tokenizer.save_pretrained(str(staged))
        write_json(staged / RECORD_NAME, dict(record))
        files = commit_folder(staged, final, {"merge": final.name})["files"]
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise MergeError(
            f"the merged model could not be written to {final.parent}: {error}",
            hint="make room on the disk and run the same command with --resume",
        ) from error
    return sum(file["num_bytes"] for file in files.values())


def _write_adapter(staged: Path, state: Mapping[str, Tensor], model: Any, adapter_config: Any) -> None:
    base = model.get_base_model()
    config = copy.copy(adapter_config)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or base.name_or_path
    config.save_pretrained(str(staged))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, staged / WEIGHTS_NAME, metadata={"format": "pt"})
    base.config.save_pretrained(str(staged))  # names of a classifier's classes, which an adapter does not say
