"""A merge that was stopped goes on, and gives the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import Interrupted, MergeError
from toolkit.merging.streaming.engine import EngineOptions, execute
from toolkit.merging.streaming.progress_file import PROGRESS_NAME
from toolkit.merging.streaming.safetensors_file import read_header
from toolkit_kernels.rules import WeightedSum

RECORD_ALL = EngineOptions(record_seconds=0)
RESUME = EngineOptions(resume=True)


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def staging_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".staging-")]


@pytest.fixture
def stopped(tmp_path, models, plan_of):
    """stopped(after) → an output whose merge was interrupted when so many bytes were written."""

    def stop(after: int, out: str = "out", **changes) -> Path:
        def interrupt(num_bytes: int) -> None:
            if num_bytes > after:
                raise Interrupted("enough")

        options = replace(RECORD_ALL, on_progress=interrupt, **changes)
        with pytest.raises(Interrupted):
            execute(plan_of(models), tmp_path / out, options)
        assert not (tmp_path / out).exists()
        assert len(staging_folders(tmp_path)) == 1
        return tmp_path / out

    return stop


@pytest.mark.parametrize("after", [0, 100, 600_000, 1_400_000])
@pytest.mark.parametrize("max_shard_bytes", [5_000, 10_000_000])
def test_a_stopped_merge_goes_on(tmp_path, models, plan_of, stopped, after, max_shard_bytes) -> None:
    plan = plan_of(models)
    execute(plan, tmp_path / "whole", EngineOptions(max_shard_bytes=max_shard_bytes))
    out = stopped(after, max_shard_bytes=max_shard_bytes)
    computed: list[str] = []

    def noted(group, weight):
        computed.append(group.name)
        return WeightedSum(weight / weight.sum())

    method = replace(plan.tensors[0].method, function=noted)
    plan = replace(plan, tensors=[replace(t, method=method) for t in plan.tensors])
    seen: list[int] = []
    options = replace(RESUME, max_shard_bytes=max_shard_bytes, on_progress=seen.append, num_threads=3)
    report = execute(plan, out, options)
    assert report.resumed
    assert len(computed) < 47  # one has no elements
    assert seen[-1] == report.bytes_written
    assert content(out) == content(tmp_path / "whole")
    assert report.groups[0]["effective_weights"] == [1 / 3] * 3
    assert staging_folders(tmp_path) == []
    assert PROGRESS_NAME not in [path.name for path in out.iterdir()]


def test_what_was_found_before_the_stop_is_in_the_report(tmp_path, models, plan_of, stopped) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(models[0] / "model.safetensors")
    for tensor in state.values():
        if tensor.numel():
            tensor.view(-1)[0] = torch.nan
    save_file(state, models[0] / "model.safetensors", {"format": "pt"})
    out = stopped(600_000, non_finite="keep")
    report = execute(plan_of(models), out, replace(RESUME, non_finite="keep"))
    assert report.resumed
    assert report.non_finite == {str(models[0] / "model.safetensors"): 47}


@pytest.mark.parametrize("change", ["input", "weights", "seed", "settings", "dtype", "shards", "order"])
def test_another_merge_does_not_go_on_with_it(
    tmp_path, models, plan_of, stopped, write_model, random_state, change
) -> None:
    out = stopped(600_000)
    options, plan = RESUME, plan_of(models)
    if change == "input":
        write_model(models[1], random_state(77))
        plan = plan_of(models)
    if change == "weights":
        plan = plan_of(models, parameters={"weight": np.array([1.0, 1.0, 1.0 + 1e-15])})
    if change == "seed":
        plan = replace(plan, seed=1)
    if change == "settings":
        plan = replace(plan, settings={"weight": 0.1})
    if change == "dtype":
        plan = plan_of(models, dtype="float32")
    if change == "shards":
        options = replace(options, max_shard_bytes=1000)
    if change == "order":
        plan = replace(plan, tensors=[replace(t, models=t.models[::-1]) for t in plan.tensors])
    report = execute(plan, out, options)
    assert not report.resumed
    assert any("of other inputs or settings" in note for note in report.notes)
    execute(plan, tmp_path / "whole", replace(options, resume=False))
    assert content(out) == content(tmp_path / "whole")
    assert staging_folders(tmp_path) == []


@pytest.mark.parametrize("change", ["device", "policy", "a file", "a small file", "nothing"])
def test_what_lies_beside_the_weights_must_be_the_same(
    tmp_path, models, plan_of, monkeypatch, change
) -> None:
    grams, beside = tmp_path / "grams.bin", tmp_path / "tokenizer"
    grams.write_bytes(bytes(2 << 20))
    beside.mkdir()
    (beside / "adapter_config.json").write_text('{"alpha": 8}')
    (beside / "README.md").write_text("")
    plan = replace(plan_of(models), depends_on=(grams, beside))

    def interrupt(num_bytes: int) -> None:
        if num_bytes > 600_000:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        execute(plan, tmp_path / "out", replace(RECORD_ALL, on_progress=interrupt))
    options = RESUME
    if change == "device":
        options = replace(options, device="cuda")  # asked for whole tensors only, which linear does without
    if change == "policy":
        options = replace(options, non_finite="keep")
    if change == "a file":
        grams.write_bytes(bytes(2 << 20))
    if change == "a small file":
        path = beside / "adapter_config.json"
        before = path.stat()
        path.write_text('{"alpha": 9}')
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (beside / "README.md").write_text("other words")
    report = execute(plan, tmp_path / "out", options)
    assert report.resumed == (change == "nothing")


def test_a_file_beside_the_weights_that_changes_meanwhile_is_an_error(tmp_path, models, plan_of) -> None:
    beside = tmp_path / "grams.safetensors"
    beside.write_bytes(b"1")
    plan = replace(plan_of(models), depends_on=(beside,))
    with pytest.raises(MergeError, match=r"grams\.safetensors was changed"):
        execute(plan, tmp_path / "out", EngineOptions(on_progress=lambda _: beside.write_bytes(b"22")))


def test_nothing_to_resume_is_said(tmp_path, models, plan_of) -> None:
    report = execute(plan_of(models), tmp_path / "out", RESUME)
    assert not report.resumed
    assert any("no unfinished merge" in note for note in report.notes)


def test_without_resume_a_stopped_merge_begins_anew(tmp_path, models, plan_of, stopped) -> None:
    out = stopped(600_000)
    assert not execute(plan_of(models), out).resumed
    assert staging_folders(tmp_path) == []


@pytest.mark.parametrize(
    "damage", ["record cut off", "record of noughts", "file cut off", "file gone", "header"]
)
def test_damaged_leftovers_are_noticed(tmp_path, models, plan_of, stopped, damage) -> None:
    execute(plan_of(models), tmp_path / "whole")
    out = stopped(600_000)
    (staged,) = staging_folders(tmp_path)
    record, weights = staged / PROGRESS_NAME, staged / "model.safetensors"
    if damage == "record cut off":
        record.write_bytes(record.read_bytes()[:-7])
    if damage == "record of noughts":
        record.write_bytes(record.read_bytes() + bytes(100) + b"\n")
    if damage == "file cut off":
        with open(weights, "r+b") as stream:
            stream.truncate(100_000)
    if damage == "file gone":
        weights.unlink()
    if damage == "header":
        with open(weights, "r+b") as stream:
            stream.write(b"\0")
    report = execute(plan_of(models), out, RESUME)
    assert report.resumed == damage.startswith("record")
    assert content(out) == content(tmp_path / "whole")


def test_the_neighbours_of_an_output_are_left_alone(tmp_path, models, plan_of, stopped) -> None:
    stopped(600_000, "out-1")
    (other,) = staging_folders(tmp_path)
    execute(plan_of(models), tmp_path / "out")
    assert other.is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_merge_that_can_go_on(tmp_path, models, plan_of, number) -> None:
    program = (
        "import json, os, signal, sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from merge_child import plan_of, Path\n"
        "from toolkit.errors import Interrupted\n"
        "from toolkit.merging.streaming.engine import EngineOptions, execute\n"
        "def slowly(num_bytes):\n"
        "    if num_bytes < 1_500_000:\n"
        "        print('ready', flush=True); time.sleep(0.5)\n"
        "options = EngineOptions(backend='reference', on_progress=slowly)\n"
        "try:\n"
        "    execute(plan_of([Path(p) for p in sys.argv[3:]]), Path(sys.argv[2]), options)\n"
        "except Interrupted as error:\n"
        "    print(error, flush=True); sys.exit(error.exit_status)\n"
    )
    child = Path(__file__).parents[2] / "faults"
    command = [sys.executable, "-c", program, str(child), str(tmp_path / "out"), *map(str, models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "--resume goes on with it" in text
    assert number.name in text
    assert not (tmp_path / "out").exists()
    for out in ("out", "whole"):
        options = json.dumps({"resume": out == "out", "backend": "reference"})
        arguments = [str(tmp_path / out), *map(str, models), "--options", options]
        command = [sys.executable, str(child / "merge_child.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"RESUMED {out == 'out'}" in result.stdout
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_handlers_of_the_host_are_left_alone(tmp_path, models, plan_of) -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:

        def raise_once(num_bytes: int) -> None:
            if not received:
                signal.raise_signal(signal.SIGTERM)
                for _ in range(100):  # the main thread takes it, between two of its steps
                    if received:
                        break
                    time.sleep(0.01)

        execute(plan_of(models), tmp_path / "out", EngineOptions(on_progress=raise_once, num_threads=1))
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


# --- --verify


def test_a_sound_merge_is_verified(tmp_path, models, plan_of) -> None:
    import hashlib

    report = execute(plan_of(models), tmp_path / "out", EngineOptions(verify=True, max_shard_bytes=601_000))
    assert report.verified is not None
    assert report.verified.num_tensors == 47
    assert report.verified.num_different == 0
    assert report.verified.num_bytes_compared == report.bytes_written
    assert report.verified.num_elements == sum(t.size for t in plan_of(models).tensors)
    assert report.verified.backend != report.backend
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert report.verified.sha256[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("where", ["wide", "small.7", "header"])
def test_a_bit_that_flipped_on_its_way_is_found(tmp_path, models, plan_of, where) -> None:
    total = plan_of(models).bytes_written

    def flip(num_bytes: int) -> None:
        if num_bytes < total:
            return
        (staged,) = staging_folders(tmp_path)
        path = staged / "model.safetensors"
        content = path.read_bytes()
        start = content.index(b"small.9") if where == "header" else read_header(path).entries[where].start
        with open(path, "r+b") as stream:
            stream.seek(start)
            byte = stream.read(1)
            stream.seek(start)
            stream.write(bytes([byte[0] ^ 2]))

    with pytest.raises(MergeError, match=where):
        execute(plan_of(models), tmp_path / "out", EngineOptions(verify=True, on_progress=flip))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-0", "model-1", "model-2"]


def test_a_bit_that_flipped_is_found_wherever_it_lies(tmp_path, write_model, plan_of) -> None:
    """Of twelve tensors four are computed again; every one is compared with what was handed to the kernel."""
    import torch

    state = {f"t{i}": torch.randn(70_000, generator=torch.Generator().manual_seed(i)) for i in range(12)}
    folders = [write_model(tmp_path / "m", state)]
    total = plan_of(folders).bytes_written
    for name in state:

        def flip(num_bytes: int, name: str = name) -> None:
            if num_bytes < total:
                return
            (staged,) = staging_folders(tmp_path)
            place = read_header(staged / "model.safetensors").entries[name].start + 4 * 43_210
            with open(staged / "model.safetensors", "r+b") as stream:
                stream.seek(place)
                byte = stream.read(1)
                stream.seek(place)
                stream.write(bytes([byte[0] ^ 1]))

        with pytest.raises(MergeError, match=rf"{name}\b|one of \d tensors"):
            execute(plan_of(folders), tmp_path / "out", EngineOptions(verify=True, on_progress=flip))


def test_what_an_earlier_process_wrote_is_said_not_to_be_compared(tmp_path, models, plan_of, stopped) -> None:
    out = stopped(600_000)
    report = execute(plan_of(models), out, replace(RESUME, verify=True))
    assert report.resumed
    assert report.verified is not None
    assert 0 < report.verified.num_bytes_compared < report.bytes_written
    assert any("computed again in a sample only" in note for note in report.notes)


def test_a_method_that_is_not_the_same_twice_is_found(tmp_path, models, plan_of, method_of) -> None:
    calls: list[str] = []

    def drifts(group):
        calls.append(group.name)
        return WeightedSum(np.array([1.0, 0.0, 0.0]) if len(calls) <= 47 else np.array([0.9, 0.1, 0.0]))

    with pytest.raises(MergeError, match="is not what"):
        execute(plan_of(models, method_of(drifts)), tmp_path / "out", EngineOptions(verify=True))
    assert staging_folders(tmp_path) == []
