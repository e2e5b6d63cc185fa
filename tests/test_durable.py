"""toolkit.durable: whatever happens, a file or folder is complete or is not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from toolkit import durable
from toolkit.errors import CheckpointError

# The system calls by which durable.py changes or secures something: at each a process can die or a disk fail.
CALLS = ("fsync", "replace", "rename")


def stage(folder: Path) -> Path:
    """A small checkpoint as a trainer leaves it: files on two levels, not committed yet."""
    staged = folder / f"{durable.STAGING_PREFIX}one"
    (staged / "deep").mkdir(parents=True)
    (staged / "weights.bin").write_bytes(bytes(range(256)) * 16)
    (staged / "deep" / "state.json").write_text('{"step": 3}')
    return staged


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    durable.commit_folder(stage(tmp_path), tmp_path / "checkpoint-3", {"step": 3})
    return tmp_path / "checkpoint-3"


class FailingCalls:
    """Counts the calls of CALLS and raises ``OSError(error_number)`` at call ``fail_at`` (from 0)."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None, error_number: int = errno.ENOSPC
    ) -> None:
        self.num_calls = 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name), fail_at, error_number))

    def wrap(self, real, fail_at: int | None, error_number: int):
        def call(*args, **kwargs):
            self.num_calls += 1
            if self.num_calls - 1 == fail_at:
                raise OSError(error_number, os.strerror(error_number))
            return real(*args, **kwargs)

        return call


def num_calls_of(monkeypatch: pytest.MonkeyPatch, action) -> int:
    with monkeypatch.context() as patch:
        counter = FailingCalls(patch, fail_at=None)
        action()
    return counter.num_calls


def run_and_kill(folder: Path, program: str, *, kill_at: int) -> int:
    """The exit status of ``program`` in a process that gets SIGKILL before its call ``kill_at`` of CALLS."""
    prelude = f"""
        import os, signal
        from pathlib import Path
        from toolkit import durable
        folder = Path({str(folder)!r})
        calls = iter(range(10_000))
        def dying(real):
            def call(*args, **kwargs):
                if next(calls) == {kill_at}:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call
        for name in {CALLS!r}:
            setattr(os, name, dying(getattr(os, name)))
    """
    source = textwrap.dedent(prelude) + textwrap.dedent(program)
    return subprocess.run([sys.executable, "-c", source], check=False, timeout=60).returncode


# --- files


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.json"
    durable.write_text(path, "old")
    durable.write_text(path, "new: ü, 日本\n")
    assert path.read_text(encoding="utf-8") == "new: ü, 日本\n"
    assert os.listdir(path.parent) == ["state.json"]


def test_write_text_secures_the_file_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(("replace", Path(target)))
        real_replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("names of open files are read from /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    durable.write_text(tmp_path / "state.json", "new")
    assert [name for name, _ in events] == ["fsync", "replace", "fsync"]
    assert events[0][1].name.startswith(durable.STAGING_PREFIX)
    assert events[1][1] == tmp_path / "state.json"
    assert events[2][1] == tmp_path


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int
) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    num_calls = num_calls_of(monkeypatch, lambda: durable.write_text(path, "old"))
    assert num_calls >= 3
    seen = set()
    for fail_at in range(num_calls):
        with monkeypatch.context() as patch:
            FailingCalls(patch, fail_at, error_number)
            with pytest.raises(OSError, match=os.strerror(error_number)) as failure:
                durable.write_text(path, "new")
        assert failure.value.errno == error_number
        assert path.read_text() in {"old", "new"}
        assert os.listdir(tmp_path) == ["state.json"]
        seen.add(path.read_text())
    assert seen == {"old", "new"}  # failures both before and after the rename were tried


def test_a_full_disk_in_the_middle_of_the_text_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "history.json"
    durable.write_text(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failure:
            durable.write_text(path, "new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert failure.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["history.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"loss": -float("inf")}, {"path": Path("x")}])
def test_write_json_refuses_what_json_cannot_say_and_keeps_the_old_file(
    tmp_path: Path, value: object
) -> None:
    path = tmp_path / "metrics.json"
    durable.write_json(path, {"loss": 1.5})
    with pytest.raises((ValueError, TypeError)):
        durable.write_json(path, value)
    assert json.loads(path.read_text()) == {"loss": 1.5}
    assert os.listdir(tmp_path) == ["metrics.json"]


# --- committed folders


def test_commit_moves_every_file_and_the_manifest_describes_them(committed: Path) -> None:
    manifest = durable.verify_folder(committed)
    assert manifest["facts"] == {"step": 3}
    assert manifest["files"]["weights.bin"]["num_bytes"] == 4096
    assert set(manifest["files"]) == {"weights.bin", "deep/state.json"}
    assert manifest["files"]["weights.bin"]["sha256"] == durable.file_sha256(committed / "weights.bin")
    assert os.listdir(committed.parent) == ["checkpoint-3"]


def test_the_digest_is_sha256_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert durable.file_sha256(tmp_path / "abc") == expected


def test_commit_never_overwrites(committed: Path) -> None:
    staged = stage(committed.parent)
    (staged / "weights.bin").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="never overwritten"):
        durable.commit_folder(staged, committed, {"step": 4})
    assert durable.verify_folder(committed)["facts"] == {"step": 3}


def test_every_file_and_folder_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("names of open files are read from /proc")
    synced: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename
    at_rename: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        at_rename.extend(synced)
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    staged = stage(tmp_path)
    durable.commit_folder(staged, tmp_path / "final", {})
    for name in ("weights.bin", "deep/state.json", "deep", ""):
        assert str(staged / name) in at_rename
    assert synced[-1] == str(tmp_path)  # the new name of the folder


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_during_commit_leaves_no_folder_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_number: int
) -> None:
    probe = tmp_path / "probe"
    staged = stage(probe)
    num_calls = num_calls_of(monkeypatch, lambda: durable.commit_folder(staged, probe / "final", {}))
    assert num_calls >= 8
    for fail_at in range(num_calls):
        folder = tmp_path / f"call-{fail_at}"
        staged = stage(folder)
        with monkeypatch.context() as patch:
            FailingCalls(patch, fail_at, error_number)
            with pytest.raises(OSError, match=os.strerror(error_number)):
                durable.commit_folder(staged, folder / "final", {})
        if (folder / "final").exists():  # only the last sync, after the rename, failed
            assert fail_at == num_calls - 1
            durable.verify_folder(folder / "final")
        durable.clear_leftovers(folder)
        assert os.listdir(folder) == (["final"] if fail_at == num_calls - 1 else [])


@pytest.mark.faults
def test_a_killed_commit_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tmp_path / "probe"
    staged = stage(probe)
    num_calls = num_calls_of(monkeypatch, lambda: durable.commit_folder(staged, probe / "final", {}))
    program = """
        durable.commit_folder(folder / ".staging-one", folder / "final", {"step": 3})
    """
    outcomes = []
    for kill_at in range(num_calls + 1):
        folder = tmp_path / f"call-{kill_at}"
        stage(folder)
        status = run_and_kill(folder, program, kill_at=kill_at)
        assert status == (0 if kill_at == num_calls else -signal.SIGKILL)
        complete = (folder / "final").exists()
        if complete:
            durable.verify_folder(folder / "final")
        durable.clear_leftovers(folder)
        assert os.listdir(folder) == (["final"] if complete else [])
        outcomes.append(complete)
    assert outcomes == sorted(outcomes)  # once it is there it stays
    assert set(outcomes) == {False, True}


@pytest.mark.faults
def test_a_killed_replacement_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    program = """
        durable.write_text(folder / "state.json", "new")
    """
    contents = []
    for kill_at in range(4):
        folder = tmp_path / f"call-{kill_at}"
        folder.mkdir()
        (folder / "state.json").write_text("old")
        run_and_kill(folder, program, kill_at=kill_at)
        durable.clear_leftovers(folder)
        assert os.listdir(folder) == ["state.json"]
        contents.append((folder / "state.json").read_text())
    assert contents == ["old", "old", "new", "new"]


# --- verification


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "weights.bin", 100)


def damage_empty(folder: Path) -> None:
    os.truncate(folder / "weights.bin", 0)


def damage_one_bit(folder: Path) -> None:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[1000] ^= 1
    (folder / "weights.bin").write_bytes(content)


def damage_append(folder: Path) -> None:
    with open(folder / "deep" / "state.json", "a") as stream:
        stream.write("\n")


def damage_delete(folder: Path) -> None:
    (folder / "deep" / "state.json").unlink()


def damage_add(folder: Path) -> None:
    (folder / "deep" / "foreign.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"weights\.bin differs"),
        (damage_empty, r"weights\.bin differs"),
        (damage_one_bit, r"weights\.bin differs"),
        (damage_append, r"state\.json differs"),
        (damage_delete, r"state\.json is missing"),
        (damage_add, r"foreign\.bin is not part of"),
    ],
)
def test_verify_names_the_file_that_is_not_what_was_committed(committed: Path, damage, message: str) -> None:
    durable.verify_folder(committed)
    damage(committed)
    with pytest.raises(CheckpointError, match=message):
        durable.verify_folder(committed)


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"weights.bin": {}}}',
        '{"files": ["weights.bin"]}',
    ],
)
def test_a_missing_or_damaged_manifest_is_a_checkpoint_error(committed: Path, manifest: str | None) -> None:
    (committed / "deep" / "state.json").unlink()
    if manifest is None:
        (committed / durable.MANIFEST_NAME).unlink()
    else:
        (committed / durable.MANIFEST_NAME).write_text(manifest)
    with pytest.raises(CheckpointError):
        durable.verify_folder(committed)


def test_a_truncated_manifest_is_a_checkpoint_error_at_every_length(committed: Path) -> None:
    path = committed / durable.MANIFEST_NAME
    whole = path.read_bytes()
    for num_bytes in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(CheckpointError):
            durable.verify_folder(committed)


def test_a_folder_that_is_not_there_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        durable.verify_folder(tmp_path / "nowhere")


# --- deletion


def test_discard_removes_the_folder_and_nothing_beside_it(committed: Path) -> None:
    (committed.parent / "other").mkdir()
    durable.discard_folder(committed)
    assert os.listdir(committed.parent) == ["other"]


def test_discard_secures_the_new_name_before_it_deletes(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    real_sync, real_delete = durable.sync, durable.shutil.rmtree
    monkeypatch.setattr(durable, "sync", lambda folder: events.append("sync") or real_sync(folder))
    monkeypatch.setattr(
        durable.shutil, "rmtree", lambda folder: events.append("delete") or real_delete(folder)
    )
    durable.discard_folder(committed)
    assert events == ["sync", "delete"]


def test_a_half_deleted_folder_is_never_taken_for_a_complete_one(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_half_way(folder: Path) -> None:
        (Path(folder) / "deep" / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.shutil, "rmtree", killed_half_way)
    with pytest.raises(KeyboardInterrupt):
        durable.discard_folder(committed)
    monkeypatch.undo()
    assert not committed.exists()
    durable.clear_leftovers(committed.parent)
    assert os.listdir(committed.parent) == []


def test_clear_leftovers_leaves_foreign_files_and_complete_folders_alone(committed: Path) -> None:
    parent = committed.parent
    stage(parent)
    (parent / ".staging-file").write_text("half")
    (parent / ".trash-checkpoint-1").mkdir()
    (parent / "notes.txt").write_text("mine")
    (parent / ".hidden").write_text("mine")
    (parent / "not.staging-x").write_text("mine")
    durable.clear_leftovers(parent)
    assert sorted(os.listdir(parent)) == [".hidden", "checkpoint-3", "not.staging-x", "notes.txt"]
    durable.verify_folder(committed)


def test_clear_leftovers_does_not_follow_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    inside = tmp_path / "run"
    inside.mkdir()
    (inside / ".trash-link").symlink_to(outside, target_is_directory=True)
    durable.clear_leftovers(inside)
    assert (outside / "precious").read_text() == "mine"
    assert os.listdir(inside) == []


def test_clear_leftovers_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    durable.clear_leftovers(tmp_path / "nowhere")
