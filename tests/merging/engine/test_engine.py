"""What the engine writes: the right numbers in files that others load, whatever threads, shards and backends."""

import gc
import json
import os
import stat
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from toolkit.merging.group import FisherTensor, MemoryReader
from toolkit.merging.plan import OutputTensor
from toolkit.merging.streaming.engine import EngineOptions, execute
from toolkit_kernels.dispatch import available
from toolkit_kernels.rules import Consensus, FisherMean, Keep, WeightedSum
from toolkit_kernels.spans import Span


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def bits(folder: Path) -> dict[str, bytes]:
    return {
        name: bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for name, t in read(folder).items()
    }


def mean_of(folders: list[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """In float64, rounded to float32 and then to ``dtype``."""
    states = [read(folder) for folder in folders]
    third = 1 / torch.tensor(len(states), dtype=torch.float64)
    return {name: sum(s[name].double() * third for s in states).float().to(dtype) for name in states[0]}


def test_the_mean_of_three_models_is_that_of_float64(tmp_path, models, plan_of) -> None:
    report = execute(plan_of(models), tmp_path / "out")
    merged, expected = read(tmp_path / "out"), mean_of(models, torch.bfloat16)
    assert list(merged) == list(expected)
    for name, tensor in expected.items():
        assert merged[name].shape == tensor.shape
        assert torch.equal(merged[name], tensor), name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "merge_report.json",
        "model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-0", "model-1", "model-2", "out"]
    assert report.bytes_written == sum(t.numel() * 2 for t in expected.values())
    assert report.bytes_read == 3 * report.bytes_written


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_inputs_and_result_may_be_of_any_types(tmp_path, write_model, random_state, plan_of, dtype) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    folders = [write_model(tmp_path / f"m{k}", random_state(k, d)) for k, d in enumerate(dtypes)]
    execute(plan_of(folders, dtype=dtype), tmp_path / "out")
    states = [read(folder) for folder in folders]
    for name, tensor in read(tmp_path / "out").items():
        exact = sum(state[name].double() * (1 / 3) for state in states)
        expected = exact if dtype == "float64" else exact.float().to(getattr(torch, dtype))
        assert torch.equal(tensor, expected), name


def test_threads_shards_and_backends_do_not_change_a_bit(tmp_path, models, plan_of) -> None:
    execute(plan_of(models), tmp_path / "out", EngineOptions(num_threads=1))
    expected = bits(tmp_path / "out")
    variants = [EngineOptions(num_threads=n) for n in (2, 3, 8)]
    variants += [EngineOptions(max_shard_bytes=n) for n in (1, 5000, 601_000, 1_500_000)]
    variants += [EngineOptions(backend=name) for name in available()]
    for number, options in enumerate(variants):
        out = tmp_path / f"out-{number}"
        execute(plan_of(models), out, options)
        assert bits(out) == expected, options


def test_shards_have_an_index_and_load(tmp_path, models, plan_of) -> None:
    report = execute(plan_of(models), tmp_path / "out", EngineOptions(max_shard_bytes=601_000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes_written
    assert len(report.outputs) == len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as stream:
            assert name in stream.keys()  # noqa: SIM118 - safe_open is no mapping


def test_a_real_model_merges_and_transformers_loads_it(tmp_path, tiny_model, plan_of) -> None:
    from transformers import AutoModelForCausalLM

    first = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    first.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(
        tmp_path / "second", max_shard_size="200KB"
    )
    folders = [tmp_path / "first", tmp_path / "second"]
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    execute(plan_of(folders), tmp_path / "out", EngineOptions(max_shard_bytes=100_000))
    expected = mean_of(folders, torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(expected) <= set(merged)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_integers_are_copied(tmp_path, write_model, plan_of) -> None:
    def state(k: int) -> dict[str, torch.Tensor]:
        counts = torch.arange(300_000) * (k + 1)
        return {"w": torch.full((5,), k + 1.0), "ids": counts, "mask": torch.tensor([True, False, k == 0])}

    folders = [write_model(tmp_path / f"m{k}", state(k)) for k in range(2)]
    execute(plan_of(folders), tmp_path / "out")
    merged = read(tmp_path / "out")
    assert torch.equal(merged["ids"], state(0)["ids"])
    assert torch.equal(merged["mask"], state(0)["mask"])
    assert merged["w"].tolist() == [1.5] * 5


def test_a_tensor_without_a_method_is_copied_or_rounded(tmp_path, models, plan_of) -> None:
    plan = plan_of(models[:1])
    copied = [replace(t, method=None, parameters={}) for t in plan.tensors]
    execute(replace(plan, tensors=copied), tmp_path / "same")
    assert bits(tmp_path / "same") == bits(models[0])
    rounded = [replace(t, method=None, parameters={}, dtype="float16") for t in plan.tensors]
    execute(replace(plan, tensors=rounded), tmp_path / "rounded")
    for name, tensor in read(models[0]).items():
        assert torch.equal(read(tmp_path / "rounded")[name], tensor.half()), name


def test_methods_may_give_whole_tensors(tmp_path, models, plan_of, method_of) -> None:
    def second(group):
        models, _ = group.tensors()
        return models[1].double() * 2

    execute(plan_of(models, method_of(second)), tmp_path / "out")
    for name, tensor in read(models[1]).items():
        assert torch.equal(read(tmp_path / "out")[name], tensor * 2), name


def test_methods_may_look_at_the_whole_tensor_first(tmp_path, models, plan_of, method_of) -> None:
    def by_norm(group):
        norms = np.sqrt(np.diag(group.gram(deltas=False)))
        return WeightedSum(norms / norms.sum() if norms.any() else np.ones(3) / 3)

    results = []
    for threads in (1, 4):
        execute(
            plan_of(models, method_of(by_norm)), tmp_path / str(threads), EngineOptions(num_threads=threads)
        )
        results.append(bits(tmp_path / str(threads)))
    assert results[0] == results[1]
    states = [read(folder) for folder in models]
    norms = torch.stack([state["wide"].double().norm() for state in states])
    expected = sum(state["wide"].double() * w for state, w in zip(states, norms / norms.sum(), strict=True))
    torch.testing.assert_close(read(tmp_path / "1")["wide"].double(), expected, rtol=2**-8, atol=1e-6)


def test_deltas_of_a_base(tmp_path, models, plan_of, method_of) -> None:
    def arithmetic(group):
        return Consensus(np.ones(2), (Keep(), Keep()), elect=False, normalize=False, scale=0.5)

    def same_as_a_sum(group):
        return WeightedSum(np.full(2, 0.5), base_weight=0.0)

    for name, function in (("deltas", arithmetic), ("sum", same_as_a_sum)):
        execute(plan_of(models[1:], method_of(function), base=models[0]), tmp_path / name)
    states = [read(folder) for folder in models]
    for name, tensor in read(tmp_path / "deltas").items():
        theta_0, *theta = (state[name].double() for state in states)
        expected = (theta_0 + 0.5 * ((theta[0] - theta_0) + (theta[1] - theta_0))).float().bfloat16()
        assert torch.equal(tensor, expected), name
        torch.testing.assert_close(tensor, read(tmp_path / "sum")[name], rtol=2**-7, atol=1e-6)


def test_fisher_reaches_the_kernel(tmp_path, models, plan_of, method_of) -> None:
    def fisher(group):
        return FisherMean(np.ones(2), np.zeros(2), np.full(2, 0.5))

    plan = plan_of(models[:2], method_of(fisher))

    def with_fisher(tensor: OutputTensor) -> OutputTensor:
        entries = []
        for k in range(2):
            values = np.full(tensor.size, 3.0 if k == 0 else 1.0, np.float32)
            reader = MemoryReader(Span.of(values), tensor.shape, "float32", f"Fisher {k}")
            entries.append(FisherTensor(reader, 1.0, 1.0, 1.0))
        return replace(tensor, fisher=tuple(entries))

    execute(replace(plan, tensors=[with_fisher(t) for t in plan.tensors]), tmp_path / "out")
    states = [read(folder) for folder in models]
    for name, tensor in read(tmp_path / "out").items():
        expected = ((3 * states[0][name].double() + states[1][name].double()) / 4).float().bfloat16()
        assert torch.equal(tensor, expected), name


def test_the_report_says_what_was_done(tmp_path, models, plan_of) -> None:
    import hashlib

    plan = plan_of(
        models, parameters={"weight": np.array([0.2, 0.3, 0.5])}, settings={"merge_method": "linear"}
    )
    special = replace(plan.tensors[3], parameters={"weight": np.array([1.0, 0.0, 0.0])})
    plan.tensors[3] = special
    execute(plan, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["method"] == "linear"
    assert report["settings"] == {"merge_method": "linear"}
    file = report["inputs"][1]["files"][0]
    assert file["sha256"] == hashlib.sha256((models[1] / "model.safetensors").read_bytes()).hexdigest()
    assert file["path"] == str(models[1] / "model.safetensors")
    by_count = {group["num_tensors"]: group for group in report["groups"]}
    assert set(by_count) == {1, 47}
    assert by_count[1]["effective_weights"] == [1.0, 0.0, 0.0]
    assert by_count[1]["example"] == special.name
    np.testing.assert_allclose(by_count[47]["effective_weights"], [0.2, 0.3, 0.5], rtol=1e-12)
    assert {"planning", "merging", "hashing", "syncing", "total"} <= set(report["seconds"])
    assert report["non_finite"] == {}
    assert set(report["versions"]) >= {"meldkit", "numpy", "python"}


def test_weights_that_differ_in_a_group_are_a_range(tmp_path, models, plan_of, method_of) -> None:
    def by_size(group):
        return WeightedSum(np.array([1.0, min(group.size, 2000) / 2000, 0.0]))

    report = execute(plan_of(models, method_of(by_size)), tmp_path / "out")
    assert report.groups[0]["effective_weights"] == {"lowest": [1.0, 0.0005, 0.0], "highest": [1.0, 1.0, 0.0]}


def test_a_method_that_gives_tensors_has_no_weights(tmp_path, models, plan_of, method_of) -> None:
    def doubled(group):
        return group.tensors()[0][0] * 2

    report = execute(plan_of(models, method_of(doubled, "doubled")), tmp_path / "out")
    assert report.groups[0]["rule"] == "doubled"
    assert report.groups[0]["effective_weights"] == []


def test_fisher_weights_are_those_that_are_applied(tmp_path, models, plan_of, method_of) -> None:
    def fisher(group):
        return FisherMean(np.array([2.0, 1e-6, 3.0]), np.zeros(3), np.full(3, 1 / 3))

    plan = plan_of(models, method_of(fisher))

    def with_fisher(tensor: OutputTensor) -> OutputTensor:
        reader = MemoryReader(Span.of(np.ones(tensor.size, np.float32)), tensor.shape, "float32", "Fisher")
        return replace(tensor, fisher=(FisherTensor(reader, 1.0, 1.0, 1.0),) * 3)

    report = execute(replace(plan, tensors=[with_fisher(t) for t in plan.tensors]), tmp_path / "out")
    assert report.groups[0]["rule"] == "FisherMean"
    assert report.groups[0]["effective_weights"] == [2.0, 1e-6, 3.0]
    assert "normal" in report.groups[0]["effective_weights_are"]


def test_files_are_readable_as_the_umask_says(tmp_path, models, plan_of) -> None:
    plan = plan_of(models)

    def write_companions(staged: Path) -> None:
        (staged / "tokenizer").mkdir()
        (staged / "tokenizer" / "secret.json").write_text("{}")
        (staged / "tokenizer" / "secret.json").chmod(0o600)

    previous = os.umask(0o022)
    try:
        execute(replace(plan, write_companions=write_companions), tmp_path / "out")
    finally:
        os.umask(previous)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def test_progress_counts_to_the_bytes_of_the_result(tmp_path, models, plan_of) -> None:
    seen: list[int] = []
    report = execute(plan_of(models), tmp_path / "out", EngineOptions(on_progress=seen.append))
    assert seen == sorted(seen)
    assert seen[-1] == report.bytes_written


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def fast_folder(tmp_path):
    """In memory where that is possible: a disk takes most of the time of a small merge, for its syncs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("number", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_merges_leave_neither_memory_nor_descriptors(fast_folder, write_model, plan_of, number) -> None:
    """Most plans are executed several times, as a service does; some results have shards, some are verified."""
    folders = [write_model(fast_folder / n, {"w": torch.ones(100), "b": torch.ones(3)}) for n in "ab"]
    plan, before = plan_of(folders), (0, 0)
    for count in range(number):
        if count % 5 == 0:
            plan = plan_of(folders)
        options = EngineOptions(
            num_threads=1 + count % 2,
            overwrite=True,
            resume=count % 3 == 0,
            verify=count % 50 == 0,
            max_shard_bytes=100 if count % 7 == 0 else 1_000_000,
        )
        execute(plan, fast_folder / "out", options)
        if count == number // 5:
            before = (num_descriptors(), resident_bytes())
    gc.collect()
    assert num_descriptors() <= before[0]
    assert resident_bytes() < before[1] + (4 << 20)
    assert sorted(path.name for path in fast_folder.iterdir()) == ["a", "b", "out"]


def test_two_hundred_merges_of_files_that_change(tmp_path, write_model, plan_of) -> None:
    """No result of an earlier merge, no descriptor and no memory is kept."""
    folders = [tmp_path / f"m{k}" for k in range(3)]
    before = (0, 0)
    for number in range(200):
        for k, folder in enumerate(folders):
            write_model(folder, {"w": torch.full((30_000,), float(number + k)), "b": torch.zeros(7)})
        execute(plan_of(folders), tmp_path / "out", EngineOptions(overwrite=True, hash_inputs=False))
        with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
            assert (file.get_tensor("w") == number + 1).all()
        if number == 20:
            before = (num_descriptors(), resident_bytes())
    assert num_descriptors() == before[0]
    assert resident_bytes() < before[1] + (8 << 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2", "out"]


def test_a_plain_merge_imports_no_torch(tmp_path, models) -> None:
    import subprocess

    program = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from merge_child import plan_of\n"
        "from pathlib import Path\n"
        "from toolkit.merging.streaming.engine import EngineOptions, execute\n"
        "execute(plan_of([Path(p) for p in sys.argv[3:]]), Path(sys.argv[2]), EngineOptions(backend='reference'))\n"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules\n"
    )
    child = Path(__file__).parents[2] / "faults"
    arguments = [str(child), str(tmp_path / "out"), *map(str, models)]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
