"""The CUDA kernels on a state dict of 1.2 B parameters: share of the device's copy bandwidth, beside torch's own ways.

The tensors of a Llama of 1.2 B parameters, four models in bfloat16. Every arm takes its turn in every round; a time is
that between two CUDA events around the call, so what Python does before the kernel counts; medians over the rounds. The
kernels' bits are compared with those of the CPU.

    python bench/gpu_kernels.py --rounds 20 --out bench/results/gpu_kernels.json
    python bench/gpu_kernels.py --sweep        other sizes of block and numbers of warps
"""

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_arms import Arm, Tensors, arms_of

from toolkit_kernels import dispatch
from toolkit_kernels.rules import Consensus, FisherMean, Inputs, Keep, Piece, Rule, Threshold, WeightedSum
from toolkit_kernels.spans import Span

NUM_MODELS = 4
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
NONE = np.zeros(NUM_MODELS)
RULES: dict[str, Rule] = {
    "weighted sum": WeightedSum(WEIGHTS),
    "fisher, float32 F": FisherMean(WEIGHTS, NONE, WEIGHTS),
    "fisher, bfloat16 F": FisherMean(WEIGHTS, NONE, WEIGHTS),
    "ties": Consensus(WEIGHTS, (Keep(among=Threshold(0x3C800000, -1)),) * NUM_MODELS, True, True, 1.0),
    "dare": Consensus(
        WEIGHTS,
        tuple(Keep(probability=0.5, key=(1, 2), stream=k, rescale=2.0) for k in range(NUM_MODELS)),
        elect=False,
        normalize=False,
        scale=1.0,
    ),
}
COMPARED_WITH_TORCH = ("weighted sum", "fisher, float32 F", "fisher, bfloat16 F")
GOAL_PERCENT = 85  # of the speed of a copy, for the rules above


def shapes(num_layers: int) -> list[tuple[int, ...]]:
    """Of Llama 3.2 1B, 146 tensors with 16 layers: tied embeddings, 8 of 32 heads for keys and values."""
    hidden, inner, keys, vocabulary = 2048, 8192, 512, 128256
    layer = [(hidden,), (hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(hidden,), (inner, hidden), (inner, hidden), (hidden, inner)]
    return [(vocabulary, hidden), *layer * num_layers, (hidden,)]


class Models:
    """Four models, their Fisher information in two dtypes, a base and an output, of random values."""

    def __init__(self, num_layers: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(dtype: torch.dtype, scale: float, power: int = 1) -> Tensors:
            drawn = (torch.randn(shape, device=device, generator=generator) for shape in shapes(num_layers))
            return [((values * scale) ** power).to(dtype) for values in drawn]

        self.base = random(torch.bfloat16, 0.02)
        self.theta = [random(torch.bfloat16, 0.02) for _ in range(NUM_MODELS)]
        self.fisher_float32 = [random(torch.float32, 1e-4, power=2) for _ in range(NUM_MODELS)]
        self.fisher_bfloat16 = [[values.bfloat16() for values in model] for model in self.fisher_float32]
        self.out = [torch.empty_like(values) for values in self.base]

    def fisher(self, name: str) -> list[Tensors]:
        """The Fisher information that the rule ``name`` reads."""
        return {"fisher, float32 F": self.fisher_float32, "fisher, bfloat16 F": self.fisher_bfloat16}.get(
            name, []
        )

    def pieces(self, name: str) -> list[Piece]:
        rule, fisher = RULES[name], self.fisher(name)
        result = []
        for i, out in enumerate(self.out):
            theta, of_tensor = (
                tuple(Span.of(model[i]) for model in models) for models in (self.theta, fisher)
            )
            base = Span.of(self.base[i]) if isinstance(rule, Consensus) else None
            result.append(Piece(Inputs(theta, base, of_tensor), rule, Span.of(out)))
        return result


def spans(piece: Piece) -> Iterator[Span]:
    """Everything that a piece reads, and its output."""
    yield from (*piece.inputs.theta, *piece.inputs.fisher, piece.out)
    if piece.inputs.base is not None:
        yield piece.inputs.base


# --- what is measured


def whole_call(pieces: Sequence[Piece]) -> Arm:
    backend = dispatch.backend("triton", "cuda")
    return lambda: backend.apply(pieces)


def kernel_alone(pieces: Sequence[Piece]) -> Arm:
    """The launches without what Python does to prepare them."""
    from toolkit_kernels.triton_backend.launch import prepare

    device = pieces[0].out.data.device
    launches = prepare(pieces, device)
    counts = torch.zeros(len(pieces), dtype=torch.int64, device=device)
    return lambda: [launch.run(counts) for launch in launches]


def device_copy() -> tuple[Arm, int]:
    """A copy within the device, and the bytes that it reads and writes."""
    source = torch.zeros(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2 * source.numel()


def milliseconds(arms: dict[str, Arm], rounds: int) -> dict[str, list[float]]:
    """The times of each arm in each round, after two calls that warm up."""
    for arm in (*arms.values(), *arms.values()):
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            arm()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return times


def made(makers: dict[str, Callable[[], Arm]]) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms, each run once, and why others cannot run here (a compiler may be missing, or memory)."""
    arms, failures = {}, {}
    for name, make in makers.items():
        try:
            arms[name] = make()
            arms[name]()
            torch.cuda.synchronize()
        except Exception as error:
            arms.pop(name, None)
            failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return arms, failures


def measure(name: str, models: Models, rounds: int) -> dict[str, Any]:
    """One rule: our kernel, and torch's ways where it has some."""
    pieces = models.pieces(name)
    copy, copied_bytes = device_copy()
    makers: dict[str, Callable[[], Arm]] = {
        "copy": lambda: copy,
        "meldkit": lambda: whole_call(pieces),
        "meldkit, kernel alone": lambda: kernel_alone(pieces),
    }
    if name in COMPARED_WITH_TORCH:
        makers |= arms_of(models.out, models.theta, models.fisher(name), WEIGHTS.tolist())
    arms, failures = made(makers)
    times = milliseconds(arms, rounds)
    num_bytes = sum(span.num_bytes for piece in pieces for span in spans(piece))
    copy_speed = copied_bytes / statistics.median(times["copy"])
    rows = {}
    for arm, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        speed = (copied_bytes if arm == "copy" else num_bytes) / median
        rows[arm] = {
            "median_milliseconds": round(median, 4),
            "quartile_milliseconds": [round(low, 4), round(high, 4)],
            "gigabytes_per_second": round(speed / 1e6, 1),
            "percent_of_copy": round(100 * speed / copy_speed, 1),
        }
    return {"bytes": num_bytes, "arms": rows, "failed": failures, "same_bits_as_cpu": same_bits(pieces)}


def same_bits(pieces: Sequence[Piece]) -> bool:
    """Whether the GPU gives the bits of this machine's fastest CPU backend, in every element of every tensor."""
    dispatch.backend("triton", "cuda").apply(pieces)
    on_cpu = dispatch.backend("auto", "cpu")

    def fetched(span: Span) -> Span:
        return Span(span.data.cpu(), span.dtype)

    for piece in pieces:
        inputs = piece.inputs
        there = replace(
            inputs,
            theta=tuple(map(fetched, inputs.theta)),
            base=None if inputs.base is None else fetched(inputs.base),
            fisher=tuple(map(fetched, inputs.fisher)),
        )
        got, expected = (
            fetched(piece.out),
            Span(torch.empty_like(piece.out.data, device="cpu"), piece.out.dtype),
        )
        on_cpu.apply([Piece(there, piece.rule, expected)])
        if not torch.equal(got.data.view(torch.int16), expected.data.view(torch.int16)):
            return False
    return True


def sweep(models: Models, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of the kernel alone for other sizes of block and numbers of warps."""
    from toolkit_kernels.triton_backend import launch

    found: dict[str, dict[str, float]] = {}
    for name in RULES:
        pieces, arms = models.pieces(name), {}
        for block, warps in itertools.product((512, 1024, 2048, 4096), (2, 4, 8)):
            launch.BLOCKS[type(RULES[name]).__name__] = block
            prepared = kernel_alone(pieces)

            def with_warps(prepared: Arm = prepared, warps: int = warps) -> None:
                launch.OPTIONS["num_warps"] = warps
                prepared()

            arms[f"block {block}, {warps} warps"] = with_warps
        times = milliseconds(arms, rounds)
        found[name] = {arm: round(statistics.median(values), 4) for arm, values in times.items()}
    return found


# --- what is said


def missing() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch (torch.cuda.is_available() is false)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gigabytes": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: {result['bytes'] / 1e9:.2f} GB at least; bits of the CPU: {result['same_bits_as_cpu']}")
    for arm, row in result["arms"].items():
        milliseconds_text = f"{row['median_milliseconds']:9.3f} ms  {row['gigabytes_per_second']:7.0f} GB/s"
        print(f"  {arm:<38}{milliseconds_text}  {row['percent_of_copy']:6.1f} % of a copy")
    for arm, reason in result["failed"].items():
        print(f"  {arm:<38} did not run: {reason}")


def is_reached(name: str, result: dict[str, Any]) -> bool | None:
    """The same bits, GOAL_PERCENT of a copy, and ahead of everything of torch's; None where torch's did not all run."""
    if not result["same_bits_as_cpu"]:
        return False
    if name not in COMPARED_WITH_TORCH:
        return True
    rows = result["arms"]
    ours = rows["meldkit"]
    torch_times = [row["median_milliseconds"] for arm, row in rows.items() if arm.startswith("torch")]
    if ours["percent_of_copy"] < GOAL_PERCENT or ours["median_milliseconds"] >= min(torch_times, default=1e9):
        return False
    return None if any(arm.startswith("torch") for arm in result["failed"]) or not torch_times else True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=16, help="fewer need less memory (16: 60 GB)")
    parser.add_argument(
        "--sweep", action="store_true", help="measure sizes of block and numbers of warps instead"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"gpu_kernels: {reason}.", file=sys.stderr)
        return 2
    models = Models(arguments.layers, "cuda")
    count = sum(values.numel() for values in models.out)
    print(
        f"{machine()['device']}: {len(models.out)} tensors, {count / 1e9:.3f} B parameters, {NUM_MODELS} models"
    )
    if arguments.sweep:
        print(json.dumps(sweep(models, max(2, arguments.rounds)), indent=2))
        return 0
    results = {}
    for name in RULES:
        results[name] = measure(name, models, max(2, arguments.rounds))
        results[name]["goal_reached"] = is_reached(name, results[name])
        show(name, results[name])
    if arguments.out:
        found = {"parameters": count, "tensors": len(models.out), "results": results, "machine": machine()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(result["goal_reached"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
