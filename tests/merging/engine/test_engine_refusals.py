"""What must never be committed: broken inputs, results that overflow, outputs on inputs, half-written folders."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.errors import MeldkitError, MergeError, ModelError, RunDirectoryError
from toolkit.merging.plan import OutputTensor
from toolkit.merging.streaming.engine import EngineOptions, execute
from toolkit_kernels.rules import Consensus, Keep, Threshold, WeightedSum
from toolkit_kernels.spans import Span

CHILD = Path(__file__).parents[2] / "faults" / "merge_child.py"


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def broken(folder: Path, name: str, element: int, value: float) -> None:
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[element] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "element"), [("wide", 721_699), ("large", 262_144), ("small.3", 0), ("scalar", 0)]
)
def test_what_is_not_finite_in_an_input_is_named(tmp_path, models, plan_of, name, element, value) -> None:
    broken(models[1], name, element, value)
    with pytest.raises(ModelError) as caught:
        execute(plan_of(models), tmp_path / "out")
    assert name in str(caught.value)
    assert str(models[1] / "model.safetensors") in str(caught.value)
    assert str(models[0]) not in str(caught.value)
    assert entries(tmp_path) == ["model-0", "model-1", "model-2"]


def test_it_is_kept_and_counted_where_that_is_asked_for(tmp_path, models, plan_of) -> None:
    broken(models[1], "wide", 5, float("nan"))
    broken(models[1], "small.3", 0, float("inf"))
    broken(models[2], "wide", 6, float("-inf"))
    report = execute(plan_of(models), tmp_path / "out", EngineOptions(non_finite="keep", verify=True))
    assert report.non_finite == {
        str(models[1] / "model.safetensors"): 2,
        str(models[2] / "model.safetensors"): 1,
    }
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["wide"].view(-1)[4:8].isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("policy", ["error", "keep"])
@pytest.mark.parametrize("name", ["wide", "small.3"])
def test_a_result_that_overflows_is_never_written(tmp_path, models, plan_of, name, policy) -> None:
    for folder in models:
        broken(folder, name, 3, 60_000.0)
    plan = plan_of(models, parameters={"weight": np.ones(3)}, dtype="float16")
    doubled = replace(plan.tensors[0].method, function=lambda group, weight: WeightedSum(weight))
    plan = replace(plan, tensors=[replace(t, method=doubled) for t in plan.tensors])
    with pytest.raises(MergeError, match=f"{name}.*overflows float16"):
        execute(plan, tmp_path / "out", EngineOptions(non_finite=policy))
    assert entries(tmp_path) == ["model-0", "model-1", "model-2"]


@pytest.mark.parametrize("policy", ["error", "keep"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_whole_tensor_that_overflows_is_never_written(
    tmp_path, write_model, plan_of, method_of, policy, dtype
) -> None:
    """Two models of finite values near the largest: their sum is not one of float32."""
    large = torch.tensor([1.0, 3e38, 2.0])
    folders = [write_model(tmp_path / name, {"w": large, "small": torch.ones(2)}) for name in "ab"]
    plan = plan_of(folders, method_of(lambda group: sum(group.tensors()[0])), dtype=dtype)
    with pytest.raises(MergeError, match=r"(?s)w: 1 values .* overflows") as caught:
        execute(plan, tmp_path / "out", EngineOptions(non_finite=policy))
    assert "the first at element 1" in str(caught.value)
    assert entries(tmp_path) == ["a", "b"]


def test_a_whole_tensor_of_models_that_are_not_finite_is_kept(tmp_path, models, plan_of, method_of) -> None:
    broken(models[1], "wide", 5, float("nan"))
    plan = plan_of(models, method_of(lambda group: sum(group.tensors()[0])))
    report = execute(plan, tmp_path / "out", EngineOptions(non_finite="keep"))
    assert report.non_finite == {str(models[1] / "model.safetensors"): 1}


def test_a_nan_that_a_mask_hides_is_seen(tmp_path, models, plan_of, method_of) -> None:
    def keep_nothing(group):
        keep = Keep(among=Threshold(0xFFFFFFFF, -1))
        return Consensus(np.ones(2), (keep, keep), elect=True, normalize=True, scale=1.0)

    plan = plan_of(models[1:], method_of(keep_nothing), base=models[0])
    execute(plan, tmp_path / "sound")
    broken(models[2], "wide", 700_000, float("nan"))
    with pytest.raises(ModelError, match=r"wide in .*model-2"):
        execute(plan_of(models[1:], method_of(keep_nothing), base=models[0]), tmp_path / "out")


def test_a_nan_that_a_whole_tensor_hides_is_seen(tmp_path, models, plan_of, method_of) -> None:
    def first(group):
        return group.tensors()[0][0]

    broken(models[2], "block", 7, float("nan"))
    with pytest.raises(ModelError, match=r"block in .*model-2"):
        execute(plan_of(models, method_of(first)), tmp_path / "out")


def test_a_copied_tensor_is_looked_at_too(tmp_path, models, plan_of) -> None:
    broken(models[0], "large", 300_000, float("inf"))
    plan = plan_of(models[:1])
    plan = replace(plan, tensors=[replace(t, method=None, parameters={}) for t in plan.tensors])
    with pytest.raises(ModelError, match="large in "):
        execute(plan, tmp_path / "out")


def test_a_method_that_fails_names_the_tensor(tmp_path, models, plan_of, method_of) -> None:
    def fails(group):
        if group.name == "odd":
            raise ZeroDivisionError("norm is zero")
        return WeightedSum(np.ones(3) / 3)

    with pytest.raises(MergeError, match=r"odd: linear failed: ZeroDivisionError: norm is zero"):
        execute(plan_of(models, method_of(fails)), tmp_path / "out")
    broken(models[1], "odd", 0, float("nan"))
    with pytest.raises(ModelError, match="odd in "):  # which is why it failed
        execute(plan_of(models, method_of(fails)), tmp_path / "out")


def test_a_result_of_another_shape_is_refused(tmp_path, models, plan_of, method_of) -> None:
    with pytest.raises(MergeError, match=r"gave the shape \(1,\), not"):
        execute(plan_of(models, method_of(lambda group: torch.zeros(1))), tmp_path / "out")


def test_shapes_that_do_not_fit_are_refused(tmp_path, write_model, plan_of) -> None:
    folders = [write_model(tmp_path / str(n), {"w": torch.ones(n, 2)}) for n in (3, 4)]
    with pytest.raises(ModelError, match=r"w has the shape \(4, 2\) in .*\(3, 2\) is needed"):
        execute(plan_of(folders), tmp_path / "out")


def test_integers_are_not_merged(tmp_path, write_model, plan_of) -> None:
    folders = [
        write_model(tmp_path / str(n), {"w": torch.ones(2, dtype=d)})
        for n, d in enumerate((torch.float32, torch.int64))
    ]
    with pytest.raises(ModelError, match="w is int64 in "):
        execute(plan_of(folders), tmp_path / "out")


# --- the folder


def test_an_input_is_never_the_output(tmp_path, write_model, plan_of) -> None:
    folders = [write_model(tmp_path / "models" / name, {"w": torch.ones(2)}) for name in "ab"]
    plan = plan_of(folders)
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*.safetensors")}
    options = EngineOptions(overwrite=True)
    (tmp_path / "link").symlink_to(folders[0])
    for out, message in (
        (folders[1], "is one of the inputs"),
        (folders[0] / "deep" / "out", "lies in the input"),
        (tmp_path / "models", "holds the input"),
        (tmp_path / "link", "is one of the inputs"),
        (tmp_path / "models" / "a" / ".." / "b", "is one of the inputs"),
    ):
        with pytest.raises(RunDirectoryError, match=message):
            execute(plan, out, options)
    assert {path: path.read_bytes() for path in (tmp_path / "models").rglob("*.safetensors")} == before


def test_an_existing_folder_is_replaced_only_on_request(tmp_path, models, plan_of) -> None:
    out = tmp_path / "out"
    out.mkdir()
    execute(plan_of(models), out)  # an empty one is no loss
    with pytest.raises(RunDirectoryError, match="exists and is not empty"):
        execute(plan_of(models), out)
    (out / "mine.txt").write_text("old")
    execute(plan_of(models), out, EngineOptions(overwrite=True))
    assert "mine.txt" not in entries(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        execute(plan_of(models), tmp_path / "file", EngineOptions(overwrite=True))
    assert entries(tmp_path) == ["file", "model-0", "model-1", "model-2", "out"]


@pytest.mark.parametrize("out", ["config", "matrices", "deep/matrices"])
def test_what_gives_no_weights_is_no_output_either(tmp_path, models, plan_of, out) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "deep" / "matrices").mkdir(parents=True)
    (tmp_path / "matrices").symlink_to(tmp_path / "deep" / "matrices")
    (tmp_path / "deep" / "matrices" / "grams.safetensors").write_bytes(b"")
    depends_on = (tmp_path / "config", tmp_path / "matrices" / "grams.safetensors")
    with pytest.raises(RunDirectoryError, match="is one of the inputs"):
        execute(
            replace(plan_of(models), depends_on=depends_on), tmp_path / out, EngineOptions(overwrite=True)
        )
    assert (tmp_path / "config").is_dir()


@pytest.mark.parametrize("root", ["cache", "real"])
@pytest.mark.parametrize("out", ["models--a/snapshots/1", "models--a/blobs", "models--a", ""])
def test_a_linked_cache_of_links_is_no_output(tmp_path, write_model, plan_of, root, out) -> None:
    """As the hub's cache: files of a snapshot are links to blobs, and the cache itself may be a link."""
    blobs = write_model(tmp_path / "real" / "models--a" / "blobs", {"w": torch.ones(2)})
    snapshot = tmp_path / "real" / "models--a" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name in entries(blobs):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    (tmp_path / "cache").symlink_to(tmp_path / "real")
    plan = plan_of([tmp_path / "cache" / "models--a" / "snapshots" / "1"])
    with pytest.raises(RunDirectoryError, match="input"):
        execute(plan, tmp_path / root / out, EngineOptions(overwrite=True))
    assert entries(snapshot) == entries(blobs) == ["config.json", "model.safetensors"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path, models, plan_of) -> None:
    out = tmp_path / "out"

    def appear(num_bytes: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    with pytest.raises(RunDirectoryError, match="exists and is not empty"):
        execute(plan_of(models), out, EngineOptions(on_progress=appear))
    assert entries(out) == ["mine.txt"]
    report = execute(plan_of(models), out, EngineOptions(resume=True, overwrite=True))
    assert report.resumed  # nothing was lost
    assert "mine.txt" not in entries(out)


def test_a_folder_that_is_half_deleted_is_not_restored(tmp_path, models, plan_of, monkeypatch) -> None:
    out, plan = tmp_path / "out", plan_of(models)
    execute(plan, out)

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(plan, out, EngineOptions(overwrite=True))
    assert (out / "model.safetensors").is_file()
    out.rename(tmp_path / "moved")  # the user takes the result elsewhere
    broken(models[0], "wide", 0, float("nan"))
    with pytest.raises(ModelError):
        execute(plan_of(models), out)
    assert entries(tmp_path) == ["model-0", "model-1", "model-2", "moved"]


def test_the_old_folder_is_back_where_the_new_one_cannot_be_renamed(
    tmp_path, models, plan_of, monkeypatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    execute(plan_of(models), out)
    (out / "old").write_text("")

    def fails_once(source: Path, target: Path) -> None:
        if target == out and ".staging-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(MergeError, match="cannot be renamed"):
        execute(plan_of(models), out, EngineOptions(overwrite=True))
    assert "old" in entries(out)


def test_the_old_folder_stays_where_the_new_one_fails(tmp_path, models, plan_of) -> None:
    out = tmp_path / "out"
    execute(plan_of(models), out)
    before = (out / "model.safetensors").read_bytes()
    broken(models[1], "wide", 0, float("nan"))
    with pytest.raises(ModelError):
        execute(plan_of(models), out, EngineOptions(overwrite=True))
    assert (out / "model.safetensors").read_bytes() == before
    assert entries(tmp_path) == ["model-0", "model-1", "model-2", "out"]


def test_companions_that_fail_leave_nothing(tmp_path, models, plan_of) -> None:
    def fails(staged: Path) -> None:
        raise ModelError("no tokenizer")

    with pytest.raises(ModelError, match="no tokenizer"):
        execute(replace(plan_of(models), write_companions=fails), tmp_path / "out")
    assert entries(tmp_path) == ["model-0", "model-1", "model-2"]


def test_an_input_that_is_written_meanwhile_is_an_error(tmp_path, models, plan_of) -> None:
    def overwrite(num_bytes: int) -> None:
        with open(models[2] / "model.safetensors", "r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"x")

    with pytest.raises(MergeError, match=r"model-2.*changed"):
        execute(plan_of(models), tmp_path / "out", EngineOptions(on_progress=overwrite))
    assert entries(tmp_path) == ["model-0", "model-1", "model-2"]


def test_an_input_that_is_missing_is_named(tmp_path, models, plan_of) -> None:
    plan = plan_of(models)
    (models[1] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model-1"):
        execute(plan, tmp_path / "out")


@pytest.mark.parametrize("again", [False, True])
def test_an_input_that_was_replaced_since_the_plan_is_an_error(
    tmp_path, models, plan_of, write_model, random_state, again
) -> None:
    plan = plan_of(models)
    if again:
        execute(plan, tmp_path / "first")
    (models[2] / "model.safetensors").unlink()
    write_model(models[2], random_state(7))
    with pytest.raises(MergeError, match=r"model-2.* was changed since the merge was planned"):
        execute(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_merges_into_one_folder(tmp_path, models, plan_of, method_of) -> None:
    begun, go_on, results = threading.Event(), threading.Event(), []

    def waits(group):
        begun.set()
        go_on.wait(60)
        return WeightedSum(np.ones(3) / 3)

    plan = plan_of(models, method_of(waits))
    first = threading.Thread(target=lambda: results.append(execute(plan, tmp_path / "out")))
    first.start()
    assert begun.wait(60)
    with pytest.raises(RunDirectoryError, match="another merge is writing"):
        execute(plan_of(models), tmp_path / "out", EngineOptions(resume=True))
    go_on.set()
    first.join()
    assert len(results) == 1
    assert entries(tmp_path) == ["model-0", "model-1", "model-2", "out"]


# --- the disk


class Endless:
    """A tensor that no disk has room for."""

    shape, dtype, where = (1 << 50,), "float32", "nowhere"

    def span(self, start: int, size: int) -> Span:
        raise AssertionError("the space is looked at first")


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, models, plan_of) -> None:
    plan = plan_of(models)
    plan.tensors.append(
        OutputTensor("endless", (1 << 50,), "float32", (Endless(),), method=plan.tensors[0].method)
    )
    with pytest.raises(RunDirectoryError, match=r"GB free, and the merge writes 4503599\.\d+ GB"):
        execute(plan, tmp_path / "out")
    assert entries(tmp_path) == ["model-0", "model-1", "model-2"]


@pytest.mark.faults
@pytest.mark.parametrize("limit_bytes", [100, 4096, 1_000_000, 2_000_000])
def test_a_disk_that_is_full_is_an_error_and_leaves_nothing(tmp_path, models, limit_bytes: int) -> None:
    program = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options = json.dumps({"backend": "reference"})
    arguments = [str(CHILD), str(tmp_path / "out"), *map(str, models), "--options", options]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("MergeError: ")
    assert "model.safetensors cannot be written: File too large" in result.stdout
    assert entries(tmp_path) == ["model-0", "model-1", "model-2"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_half_way_keeps_what_is_finished(
    tmp_path, models, plan_of, monkeypatch, code
) -> None:
    execute(plan_of(models), tmp_path / "whole")
    pwrite, done = os.pwrite, [0]

    def fails(descriptor: int, memory: memoryview, start: int) -> int:
        done[0] += memory.nbytes
        if done[0] > 1_500_000:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, memory, start)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fails)
        with pytest.raises(MergeError, match="--resume goes on") as caught:
            execute(plan_of(models), tmp_path / "out", EngineOptions(num_threads=1))
    assert os.strerror(code) in str(caught.value)
    report = execute(plan_of(models), tmp_path / "out", EngineOptions(resume=True))
    assert report.resumed
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert entries(tmp_path) == ["model-0", "model-1", "model-2", "out", "whole"]


def test_an_error_of_the_system_is_one_for_the_user(tmp_path, models, plan_of) -> None:
    def fails(staged: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(staged / "README.md"))

    with pytest.raises(MergeError, match=r"README\.md: No space left on device"):
        execute(replace(plan_of(models), write_companions=fails), tmp_path / "out")
    assert entries(tmp_path) == ["model-0", "model-1", "model-2"]  # nothing was finished yet


OPEN_FILES = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from merge_child import plan_of
from toolkit.errors import MergeError
from toolkit.merging.streaming.engine import EngineOptions, execute
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
try:
    execute(plan_of([Path(p) for p in sys.argv[4:]]), Path(sys.argv[3]), EngineOptions(backend="reference"))
except MergeError as error:
    print(error)
"""


@pytest.mark.parametrize("hard", [60, 1000])
def test_more_shards_than_files_may_be_open(tmp_path, write_model, random_state, hard) -> None:
    folders = [write_model(tmp_path / f"m{k}", random_state(k), shards=40) for k in range(2)]
    arguments = [str(CHILD.parent), str(hard), str(tmp_path / "out"), *map(str, folders)]
    result = subprocess.run(
        [sys.executable, "-c", OPEN_FILES, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert ("ulimit -n" in result.stdout) == (hard == 60)
    assert (tmp_path / "out").exists() == (hard == 1000)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, models, plan_of) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeldkitError, match="cannot be written"):
        execute(plan_of(models), tmp_path / "file" / "out")
