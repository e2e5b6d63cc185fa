"""SIGKILL at any file operation of a merge: nothing under the final name that is not whole, and --resume ends it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.faults
CHILD = Path(__file__).with_name("merge_child.py")
OPTIONS = {"backend": "reference", "record_seconds": 0, "max_shard_bytes": 60_000, "num_threads": 2}


def run(
    out: Path, models: list[Path], kill: int = -1, method: str = "linear", **options
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHILD), str(out), *map(str, models), "--kill", str(kill)]
    command += ["--method", method]
    return subprocess.run(
        [*command, "--options", json.dumps(OPTIONS | options)], capture_output=True, text=True, check=False
    )


def digests(folder: Path) -> dict[str, str]:
    """Of everything but the report, which holds times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "merge_report.json"
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    from toolkit.merging.streaming.safetensors_file import header_bytes

    folder, generator = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    sizes = {f"t{i}": 20_000 if i % 4 == 0 else 50 for i in range(12)}
    for k in range(2):
        (folder / f"m{k}").mkdir()
        (folder / f"m{k}" / "config.json").write_text("{}")
        header = header_bytes([(name, "float16", (size,), 2 * size) for name, size in sizes.items()], {})
        data = generator.standard_normal(sum(sizes.values())).astype(np.float16).tobytes()
        (folder / f"m{k}" / "model.safetensors").write_bytes(header + data)
    return [folder / "m0", folder / "m1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models) -> tuple[dict[str, str], int]:
    """What an undisturbed merge gives, and its file operations."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = run(out, models)
    assert result.returncode == 0, result.stdout + result.stderr
    return digests(out), int(result.stdout.split()[1])


def kill_and_resume(
    folder: Path,
    models: list[Path],
    expected: dict[str, str],
    at: int,
    again: int = -1,
    method: str = "linear",
) -> bool:
    """Whether the merge was resumed and not begun anew."""
    out = folder / "out"
    killed = run(out, models, at, method)
    assert killed.returncode == -9, killed.stdout + killed.stderr
    if out.exists():  # killed after the rename
        assert digests(out) == expected
        return False
    if again > 0:
        second = run(out, models, again, method, resume=True)
        assert second.returncode in (0, -9), second.stdout + second.stderr
        if out.exists():
            assert digests(out) == expected
            return False
    last = run(out, models, method=method, resume=True)
    assert last.returncode == 0, last.stdout + last.stderr
    assert digests(out) == expected
    assert [path.name for path in folder.iterdir()] == ["out"]
    return "RESUMED True" in last.stdout


def test_killed_at_some_operations(tmp_path, models, whole) -> None:
    expected, num_operations = whole
    assert num_operations > 40
    points = sorted({1, 2, num_operations // 4, num_operations // 2, num_operations - 4, num_operations - 1})
    resumed = []
    for at in points:
        (tmp_path / str(at)).mkdir()
        resumed.append(kill_and_resume(tmp_path / str(at), models, expected, at))
    assert any(resumed)


@pytest.mark.parametrize("method", ["fisher", "tensor"])
def test_killed_half_way_with_other_kinds_of_methods(tmp_path, models, method) -> None:
    result = run(tmp_path / "whole", models, method=method)
    assert result.returncode == 0, result.stdout + result.stderr
    (tmp_path / "killed").mkdir()
    half = int(result.stdout.split()[1]) // 2
    assert kill_and_resume(
        tmp_path / "killed", models, digests(tmp_path / "whole"), half, method=method
    )  # and not begun anew


@pytest.mark.slow
def test_killed_at_every_operation(tmp_path, models, whole) -> None:
    expected, num_operations = whole
    resumed = 0
    for at in range(1, num_operations + 1):
        (tmp_path / str(at)).mkdir()
        resumed += kill_and_resume(tmp_path / str(at), models, expected, at)
    assert (
        resumed > num_operations // 3
    )  # the others were killed before anything was recorded, or after the rename


@pytest.mark.slow
def test_killed_again_while_resuming(tmp_path, models, whole) -> None:
    expected, num_operations = whole
    for number, at in enumerate(range(1, num_operations + 1, 5)):
        (tmp_path / str(at)).mkdir()
        kill_and_resume(tmp_path / str(at), models, expected, at, again=3 + 4 * number % num_operations)


@pytest.mark.slow
def test_killed_while_replacing(tmp_path, models, whole) -> None:
    """At any operation of the commit the old folder or the new one is there, or comes back with the next merge."""
    expected, _ = whole
    out = tmp_path / "out"
    for at_from_end in range(1, 14):
        run(out, models, overwrite=True)
        (out / "old").write_text("")
        num_operations = int(run(tmp_path / "count", models, overwrite=True).stdout.split()[1])
        killed = run(out, models, num_operations - at_from_end, overwrite=True)
        assert killed.returncode == -9
        if out.exists():
            assert digests(out).items() >= expected.items()
        last = run(out, models, overwrite=True, resume=True)
        assert last.returncode == 0, last.stdout + last.stderr
        assert digests(out) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["count", "out"]
