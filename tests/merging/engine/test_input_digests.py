"""Digests of inputs: right whatever happened to a file, remembered only where nothing did."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from toolkit.merging.streaming import digest_memory
from toolkit.merging.streaming.digest_memory import SETTLED_NS, DigestMemory
from toolkit.merging.streaming.engine import EngineOptions, execute
from toolkit.merging.streaming.input_digests import BLOCK_BYTES, InputDigests
from toolkit.merging.streaming.safetensors_file import FileIdentity


def later() -> int:
    """A clock by which files of this test have settled."""
    return time.time_ns() + 2 * SETTLED_NS


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(path: Path, memory: Path | None, *, recall: bool = True, clock=later, num_threads: int = 2):
    """(SHA-256, whether it was remembered) of one file, by a memory that was opened for it."""
    kept = None if memory is None else DigestMemory(memory, clock)
    with InputDigests([FileIdentity.of(path)], num_threads, kept, recall=recall) as found:
        (digest,) = found.results(lambda: None).values()
    return digest.sha256, digest.is_remembered


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "input"
    path.write_bytes(os.urandom(3 * BLOCK_BYTES + 17))
    return path


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_the_digest_is_that_of_all_bytes(tmp_path, num_bytes, num_threads) -> None:
    path = tmp_path / "input"
    path.write_bytes(os.urandom(num_bytes))
    assert digests(path, None, num_threads=num_threads) == (sha256(path), False)


def test_a_file_that_did_not_change_is_hashed_once(tmp_path, file) -> None:
    memory = tmp_path / "cache" / "digests.txt"
    expected = sha256(file)
    assert digests(file, memory) == (expected, False)
    assert digests(file, memory) == (expected, True)
    assert digests(file, memory, recall=False) == (expected, False)
    assert memory.stat().st_mode & 0o077 == 0


def test_other_bytes_of_the_same_size_with_the_old_time_are_noticed(tmp_path, file) -> None:
    memory, before = tmp_path / "digests.txt", file.stat()
    digests(file, memory)
    with open(file, "r+b") as stream:
        stream.write(bytes(byte ^ 1 for byte in file.read_bytes()[:5]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    assert digests(file, memory) == (sha256(file), False)


def test_a_file_that_takes_the_place_of_another_is_noticed(tmp_path, file) -> None:
    memory, before = tmp_path / "digests.txt", file.stat()
    digests(file, memory)
    other = tmp_path / "other"
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)
    assert digests(file, memory) == (sha256(file), False)


def test_what_was_written_shortly_before_is_not_remembered(tmp_path, file) -> None:
    memory = tmp_path / "digests.txt"
    for clock in (time.time_ns, lambda: file.stat().st_mtime_ns + SETTLED_NS - 1, lambda: 0):
        digests(file, memory, clock=clock)
        assert digests(file, memory) == (sha256(file), False)
        memory.unlink()
    digests(file, memory, clock=lambda: file.stat().st_ctime_ns + SETTLED_NS)
    assert digests(file, memory) == (sha256(file), True)


def test_an_old_mtime_does_not_make_a_file_old(tmp_path, file) -> None:
    memory = tmp_path / "digests.txt"
    os.utime(file, ns=(0, 0))
    digests(file, memory, clock=time.time_ns)
    assert not memory.exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(tmp_path, file) -> None:
    memory = tmp_path / "digests.txt"

    class Touching(DigestMemory):
        def now(self) -> int:  # asked just before the file is read
            file.touch()
            return super().now()

    with InputDigests([FileIdentity.of(file)], 2, Touching(memory, later), recall=True) as found:
        found.results(lambda: None)
    assert not memory.exists()


def test_half_a_file_is_never_remembered(tmp_path, file) -> None:
    """The merge ends while a file is being hashed."""
    memory, reading, go_on = tmp_path / "digests.txt", threading.Event(), threading.Event()

    class Waiting(DigestMemory):
        def now(self) -> int:
            reading.set()
            assert go_on.wait(10)
            return super().now()

    found = InputDigests([FileIdentity.of(file)], 2, Waiting(memory, later), recall=True)
    with found:
        assert reading.wait(10)
        threading.Timer(0.2, go_on.set).start()
    assert not memory.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "noise", "empty", "other sha"])
def test_a_damaged_memory_is_passed_over(tmp_path, file, damage) -> None:
    memory = tmp_path / "digests.txt"
    digests(file, memory)
    content = memory.read_bytes()
    place = content.index(sha256(file).encode())
    changed = {
        "flip": content[: place + 3] + bytes([content[place + 3] ^ 1]) + content[place + 4 :],
        "cut": content[:-9],
        "noise": os.urandom(5000),
        "empty": b"\n\n \n",
        "other sha": content.replace(sha256(file).encode(), b"0" * 64),
    }[damage]
    memory.write_bytes(changed)
    assert digests(file, memory) == (sha256(file), False)
    digests(file, memory)
    assert digests(file, memory) == (sha256(file), True)


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for the file"])
def test_a_memory_that_cannot_be_written_is_no_error(tmp_path, file, obstacle) -> None:
    memory = tmp_path / "cache" / "digests.txt"
    if obstacle == "a file for a folder":
        memory.parent.write_text("")
    else:
        memory.mkdir(parents=True)
    assert digests(file, memory) == (sha256(file), False)


def test_several_that_write_at_the_same_time_lose_nothing(tmp_path) -> None:
    files = [tmp_path / f"input-{number}" for number in range(200)]
    for number, path in enumerate(files):
        path.write_bytes(str(number).encode())
    memory = tmp_path / "digests.txt"

    def write(part: list[Path]) -> None:
        own = DigestMemory(memory, later)  # as another process would have it
        for path in part:
            own.remember(path.stat(), sha256(path), later())

    threads = [threading.Thread(target=write, args=(files[k::8],)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(digests(path, memory) == (sha256(path), True) for path in files)


def test_the_memory_stays_small_and_keeps_the_latest(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(digest_memory, "MAX_BYTES", 4000)
    memory, path = tmp_path / "digests.txt", tmp_path / "input"
    path.write_bytes(b"")
    for number in range(300):
        os.utime(path, ns=(number, number))
        DigestMemory(memory, later).remember(path.stat(), f"{number:064}", later())
        assert DigestMemory(memory, later).known(path.stat()) == f"{number:064}"
        assert memory.stat().st_size <= 4000
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("digests")] == ["digests.txt"]


def test_a_file_that_is_gone_is_named(tmp_path, file) -> None:
    identity = FileIdentity.of(file)
    file.unlink()
    with (
        InputDigests([identity], 2, None, recall=True) as found,
        pytest.raises(OSError, match="No such file") as e,
    ):
        found.results(lambda: None)
    assert e.value.filename == str(file)


def test_the_report_says_which_digests_were_remembered(tmp_path, models, plan_of, monkeypatch) -> None:
    monkeypatch.setattr(digest_memory, "SETTLED_NS", 0)  # the models have just been written
    memory = tmp_path / "digests.txt"
    for number, (verify, expected) in enumerate(
        [(False, "computed"), (False, "remembered"), (True, "computed")]
    ):
        options = EngineOptions(digest_memory=memory, verify=verify)
        execute(plan_of(models), tmp_path / f"out-{number}", options)
        report = json.loads((tmp_path / f"out-{number}" / "merge_report.json").read_text())
        for entry in (file for model in report["inputs"] for file in model["files"]):
            assert (entry["sha256"], entry["sha256_was"]) == (sha256(Path(entry["path"])), expected)
    execute(plan_of(models), tmp_path / "out", EngineOptions(digest_memory=memory, hash_inputs=False))
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert all(
        file["sha256"] is None and "sha256_was" not in file for m in report["inputs"] for file in m["files"]
    )


def test_nothing_is_remembered_unless_it_is_asked_for(tmp_path, models, plan_of, own_cache) -> None:
    execute(plan_of(models), tmp_path / "out")
    assert not list(own_cache.rglob("*digests*"))
