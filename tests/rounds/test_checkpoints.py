"""The checkpoint store against a trainer that writes one small file."""

import logging
import shutil
from types import SimpleNamespace

import pytest

from toolkit.errors import CheckpointError
from toolkit.rounds.checkpoints import CheckpointStore
from toolkit.rounds.journal import Journal


class OneFileTrainer:
    """Only what the store asks of a trainer."""

    def __init__(self, staging):
        self.staging = staging
        self.step = 0
        self.error: Exception | None = None

    def save(self):
        folder = self.staging / f"checkpoint-{self.step}"
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(b"%d" % self.step * 50)
        if self.error is not None:
            raise self.error
        return folder


@pytest.fixture
def store_of(tmp_path):
    one = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)

    def make(keep=2):
        return CheckpointStore(tmp_path, "model", Journal(tmp_path), keep=keep, process_state=one)

    return make


@pytest.fixture
def commit_steps(store_of):
    def commit(*steps, keep=2):
        store = store_of(keep)
        trainer = OneFileTrainer(store.staging)
        for trainer.step in steps:
            store.commit(trainer)
        return store

    return commit


def names(store) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


def test_the_newest_are_kept(commit_steps, store_of):
    store = commit_steps(1, 2, 3, 4, keep=3)
    assert names(store) == ["checkpoint-00000002", "checkpoint-00000003", "checkpoint-00000004"]
    assert store_of().latest() == store.folder / "checkpoint-00000004"


def test_the_same_step_twice_is_one_checkpoint(commit_steps):
    store = commit_steps(3, 3)
    assert names(store) == ["checkpoint-00000003"]


def test_a_checkpoint_counts_only_once_it_is_in_the_journal(commit_steps, store_of, tmp_path):
    store = commit_steps(1, 2)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_text("".join(lines[:-1]))  # killed between the rename and the journal
    again = store_of()
    again.recover()
    assert names(store) == ["checkpoint-00000001"]
    assert again.latest() == store.folder / "checkpoint-00000001"


def test_fall_back_to_the_one_before(commit_steps, store_of, caplog):
    store = commit_steps(1, 2)
    newest = store.folder / "checkpoint-00000002" / "weights.bin"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    again = store_of()
    with caplog.at_level(logging.WARNING):
        assert again.latest() == store.folder / "checkpoint-00000001"
    assert "weights.bin differs" in caplog.text
    again.forget_after(1)
    assert names(store) == ["checkpoint-00000001"]
    trainer = OneFileTrainer(again.staging)
    trainer.step = 2
    assert again.commit(trainer) == store.folder / "checkpoint-00000002"


def test_no_intact_checkpoint_is_never_a_new_beginning(commit_steps, store_of):
    store = commit_steps(1, 2)
    for folder in store.folder.iterdir():
        (folder / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact"):
        store_of().latest()


def test_never_saved_is_none(store_of):
    store = store_of()
    store.recover()
    assert store.latest() is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_full_disk_keeps_what_there_was(commit_steps, store_of, error):
    store = commit_steps(1, 2)
    trainer = OneFileTrainer(store.staging)
    trainer.step, trainer.error = 3, error
    with pytest.raises(CheckpointError, match="checkpoint of step 3 could not be written") as caught:
        store.commit(trainer)
    assert "--resume" in caught.value.hint
    assert names(store) == ["checkpoint-00000001", "checkpoint-00000002"]
    assert store_of().latest().name == "checkpoint-00000002"


def test_free_space_is_looked_at_first(commit_steps, store_of, monkeypatch):
    store = commit_steps(1, 2)
    usage = shutil.disk_usage(store.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50))
    trainer = OneFileTrainer(store.staging)
    trainer.step = 3
    with pytest.raises(CheckpointError, match="MB are free"):
        store.commit(trainer)
    assert not store.staging.exists() or not any(store.staging.iterdir())
