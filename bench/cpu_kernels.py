"""Kernels in memory against a copy and against what people write in torch, alternating in one process.

    python bench/cpu_kernels.py [--out bench/results/cpu_kernels.json] [--num-elements 64Mi] [--threads 2]
           [--compile]

Each subject moves the bytes that its formula needs at least: every input read once, the output written once. It is
compared with the faster of torch's copy_ and numpy's copyto in the same run. The order is forwards, then backwards;
reported are medians. Peers: the weighted sum in eager bf16, in eager fp32, and by torch.compile's C++ (--compile; needs
g++); the Fisher mean by torch.stack in fp32.

Threads of OpenMP wait asleep: else those of torch would keep a core busy for milliseconds after each of its subjects,
in the time of the next one.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import numpy as np
import torch

from toolkit_kernels import dispatch
from toolkit_kernels.backend import Backend
from toolkit_kernels.pool import Pool
from toolkit_kernels.rules import (
    BLOCK,
    Consensus,
    FisherMean,
    Inputs,
    Keep,
    Piece,
    Rule,
    Threshold,
    WeightedSum,
)
from toolkit_kernels.spans import Span

WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
FLAGS_OF_INTEREST = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "f16c",
    "neon",
    "asimd",
    "sve",
)
NUM_PIECES_PER_THREAD = 4


@dataclass
class Data:
    """Four bf16 models near a base, the Fisher information of each in fp32, and an output."""

    base: torch.Tensor
    theta: list[torch.Tensor]
    fisher: list[torch.Tensor]
    out: torch.Tensor

    @classmethod
    def of_size(cls, size: int) -> "Data":
        generator = torch.Generator().manual_seed(0)

        def normal() -> torch.Tensor:
            return torch.randn(size, generator=generator)

        base = normal() * 0.02
        theta = [(base + normal() * 1e-3).bfloat16() for _ in range(4)]
        fisher = [normal().square_().mul_(1e-8) for _ in range(4)]
        return cls(base.bfloat16(), theta, fisher, torch.zeros(size, dtype=torch.bfloat16))


@dataclass
class Subject:
    name: str
    num_bytes: int  # an element
    run: Callable[[], object]


# --- ours


def cut(inputs: Inputs, num_pieces: int) -> list[Inputs]:
    """The inputs in pieces of equal size, but for the last."""
    size = -(-inputs.size // num_pieces // BLOCK) * BLOCK

    def part(spans: tuple[Span, ...], start: int) -> tuple[Span, ...]:
        return tuple(span.part(start, min(size, inputs.size - start)) for span in spans)

    pieces = []
    for start in range(0, inputs.size, size):
        base = part((inputs.base,), start)[0] if inputs.base is not None else None
        pieces.append(Inputs(part(inputs.theta, start), base, part(inputs.fisher, start), start))
    return pieces


def subjects_of(name: str, backend: Backend, data: Data, pool: Pool) -> list[Subject]:
    theta, base = tuple(Span.of(x) for x in data.theta), Span.of(data.base)
    fisher, out = tuple(Span.of(x) for x in data.fisher), Span.of(data.out)
    num_pieces = NUM_PIECES_PER_THREAD * pool.num_threads
    limit = int(np.float32(1e-3).view(np.uint32))
    trimmed = tuple(Keep(among=Threshold(limit, 0)) for _ in range(3))
    masked = tuple(Keep(probability=0.5, key=(1, 2), stream=k, rescale=2.0) for k in range(3))
    deltas = Inputs(theta[:3], base)

    def rule(what: str, num_bytes: int, inputs: Inputs, how: Rule) -> Subject:
        pieces = [Piece(part, how, out.part(part.start, part.size)) for part in cut(inputs, num_pieces)]
        return Subject(f"{what}, {name}", num_bytes, lambda: pool.map(lambda p: backend.apply([p]), pieces))

    def reduction(what: str, num_bytes: int, inputs: Inputs, reduce: Callable[[Inputs], object]) -> Subject:
        parts = cut(inputs, num_pieces)
        return Subject(f"{what}, {name}", num_bytes, lambda: pool.map(reduce, parts))

    prefixes = [limit >> 16] * 3
    return [
        rule("weighted sum of 4", 10, Inputs(theta), WeightedSum(WEIGHTS)),
        rule("Fisher mean of 4", 26, Inputs(theta, fisher=fisher), FisherMean(WEIGHTS, 0 * WEIGHTS, WEIGHTS)),
        rule("task arithmetic of 3", 10, deltas, Consensus(np.ones(3), (Keep(),) * 3, False, False, 1.0)),
        rule("TIES of 3, trimmed", 10, deltas, Consensus(np.ones(3), trimmed, True, True, 1.0)),
        rule("DARE of 3", 10, deltas, Consensus(np.ones(3), masked, False, False, 1.0)),
        rule("DARE-TIES of 3", 10, deltas, Consensus(np.ones(3), masked, True, True, 1.0)),
        reduction("histogram of 3, upper", 8, deltas, lambda part: backend.histogram(part, None)),
        reduction("histogram of 3, lower", 8, deltas, lambda part: backend.histogram(part, prefixes)),
        reduction("Gram matrix of 2", 4, Inputs(theta[:2]), backend.gram),
        reduction("Gram matrix of 4", 8, Inputs(theta), backend.gram),
    ]


# --- peers


def copies(data: Data, pool: Pool) -> list[Subject]:
    """Both move 8 bytes an element."""
    source, target = (
        torch.ones(2 * len(data.out), dtype=torch.bfloat16),
        torch.zeros(2 * len(data.out)).bfloat16(),
    )
    a, b = source.view(torch.uint16).numpy(), target.view(torch.uint16).numpy()
    halves = list(zip(np.array_split(a, pool.num_threads), np.array_split(b, pool.num_threads), strict=True))
    return [
        Subject("copy, torch", 8, lambda: target.copy_(source)),
        Subject("copy, numpy", 8, lambda: pool.map(lambda pair: np.copyto(pair[1], pair[0]), halves)),
    ]


def eager_bfloat16(data: Data) -> torch.Tensor:
    total = WEIGHTS[0].item() * data.theta[0]
    for weight, theta in zip(WEIGHTS[1:].tolist(), data.theta[1:], strict=True):
        total = total + weight * theta
    return total


def eager_float32(data: Data) -> torch.Tensor:
    total = torch.zeros(len(data.out))
    for weight, theta in zip(WEIGHTS.tolist(), data.theta, strict=True):
        total.add_(theta.float(), alpha=weight)
    return total.bfloat16()


def stacked_fisher(data: Data) -> torch.Tensor:
    weights = torch.from_numpy(WEIGHTS).float()[:, None]
    theta, fisher = torch.stack(data.theta).float(), torch.stack(data.fisher)
    return ((weights * fisher * theta).sum(0) / (weights * fisher).sum(0)).bfloat16()


def fused_sum(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    w, x, y, z = WEIGHTS.tolist()
    return (a.float() * w + b.float() * x + c.float() * y + d.float() * z).bfloat16()


def peers_of(data: Data, with_compile: bool) -> list[Subject]:
    peers = [
        Subject("weighted sum of 4, eager bf16", 10, lambda: eager_bfloat16(data)),
        Subject("weighted sum of 4, eager fp32", 10, lambda: eager_float32(data)),
        Subject("Fisher mean of 4, stacked fp32", 26, lambda: stacked_fisher(data)),
    ]
    if with_compile:
        compiled = torch.compile(fused_sum)
        peers.append(Subject("weighted sum of 4, torch.compile", 10, lambda: compiled(*data.theta)))
    return peers


# --- measuring


def measure(subjects: list[Subject], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, forwards and backwards in turn; the first run of each is not counted."""
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for subject in subjects:
        subject.run()
    for repeat in range(repeats):
        for subject in subjects if repeat % 2 == 0 else reversed(subjects):
            began = time.perf_counter()
            subject.run()
            seconds[subject.name].append(time.perf_counter() - began)
    return seconds


def report(
    subjects: list[Subject], seconds: dict[str, list[float]], size: int
) -> dict[str, dict[str, float]]:
    rows = {}
    for subject in subjects:
        median = statistics.median(seconds[subject.name])
        rows[subject.name] = {
            "milliseconds": median * 1e3,
            "best_milliseconds": min(seconds[subject.name]) * 1e3,
            "nanoseconds_an_element": median / size * 1e9,
            "gigabytes_a_second": subject.num_bytes * size / median / 1e9,
        }
    copy = max(row["gigabytes_a_second"] for name, row in rows.items() if name.startswith("copy"))
    for row in rows.values():
        row["of_copy"] = row["gigabytes_a_second"] / copy
    return rows


def machine() -> dict[str, object]:
    information = Path("/proc/cpuinfo")
    words = set(information.read_text().split()) if information.exists() else set()
    installed = ("numpy", "torch", "numba", "llvmlite")
    return {
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_flags": [flag for flag in FLAGS_OF_INTEREST if flag in words],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in installed},
    }


def elements(text: str) -> int:
    """64Mi -> 67108864."""
    return int(text[:-2]) << {"Ki": 10, "Mi": 20, "Gi": 30}[text[-2:]] if text.endswith("i") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--num-elements", type=elements, default=elements("64Mi"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backends", nargs="+", default=["numba", "torch"])
    parser.add_argument("--compile", action="store_true", help="torch.compile too: needs g++")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = Data.of_size(arguments.num_elements)
    with Pool(arguments.threads) as pool:
        subjects = copies(data, pool)
        for name in arguments.backends:
            subjects += subjects_of(name, dispatch.backend(name), data, pool)
        subjects += peers_of(data, arguments.compile)
        rows = report(subjects, measure(subjects, arguments.repeats), arguments.num_elements)
    for name, row in rows.items():
        figures = f"{row['milliseconds']:9.1f} ms {row['nanoseconds_an_element']:8.3f} ns/element"
        print(f"{name:36} {figures} {row['gigabytes_a_second']:7.1f} GB/s {row['of_copy']:6.0%} of copy")
    settings = {
        "command": "python bench/cpu_kernels.py",
        "num_elements": arguments.num_elements,
        "threads": arguments.threads,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
    }
    result = {**settings, "repeats": arguments.repeats, **machine(), "subjects": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
