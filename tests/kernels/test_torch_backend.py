"""The blocked torch backend: scratch memory, threads, devices."""

import math
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit_kernels import dispatch
from toolkit_kernels.rules import BLOCK, Inputs, Piece, WeightedSum
from toolkit_kernels.spans import Span
from toolkit_kernels.torch_backend import memory

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

COUNT_THREADS = """
import os
import numpy as np, torch
from toolkit_kernels import dispatch
from toolkit_kernels.rules import *
from toolkit_kernels.spans import Span

torch.set_num_threads(1)  # while the inputs are made
backend = dispatch.backend("torch")
theta = tuple(Span.of(torch.randn(300_000).bfloat16()) for _ in range(3))
fisher = tuple(Span.of(torch.rand(300_000)) for _ in range(3))
weights = np.full(3, 1 / 3)
keep = tuple(Keep(among=Threshold(0x3F000000, 99), probability=0.5) for _ in range(3))
rules = [WeightedSum(weights), FisherMean(weights, weights, weights), Consensus(weights, keep, True, True, 1.0)]
out = Span.of(torch.empty(300_000))
torch.set_num_threads(4)
before = len(os.listdir("/proc/self/task"))
inputs = Inputs(theta, theta[0], fisher)
for rule in rules:
    backend.apply([Piece(inputs, rule, out)])
backend.gram(inputs)
backend.histogram(inputs, None)
backend.histogram(inputs, [0x3F00] * 3)
backend.sift(inputs, [(0x3F000000, 0x3F800000)] * 3, 1 << 20)
backend.nth_equal(inputs, 0, 0x3F000000, 5)
backend.non_finite(inputs)
backend.add_squares(out, theta[0])
print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads())
torch.randn(1 << 20).add(1)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads that Linux lists")
def test_torch_starts_no_threads_of_its_own():
    """Chunks are too small for torch to divide; the last line shows that it would have been seen."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", COUNT_THREADS],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "kernels",
    )
    assert done.stdout.split() == ["0", "4", "3"]


def test_chunks_fit_the_cache():
    for num_rows in range(1, 200):
        size = memory.chunk_size(num_rows, CPU)
        assert BLOCK <= size <= memory.CPU_CHUNK
        assert size == 1 << int(math.log2(size))
        assert size == BLOCK or 8 * num_rows * size <= memory.CPU_SCRATCH_BYTES
    assert memory.chunk_size(40, torch.device("cuda")) == memory.DEVICE_CHUNK


def test_scratch_is_kept_and_belongs_to_a_thread(cases):
    """The same memory from call to call, other memory in another thread."""
    backend = dispatch.backend("torch")
    piece = cases.piece("weighted_sum", 2, 9 * BLOCK, ("bfloat16",), "bfloat16")
    addresses: list[list[int]] = []

    def use() -> None:
        rows = []
        for _ in range(3):
            backend.apply([piece])
            rows.append(memory.scratch.rows(2, BLOCK, CPU)[0].data_ptr())
        addresses.append(rows)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    use()
    for thread in threads:
        thread.join()
    assert all(len(set(rows)) == 1 for rows in addresses)


def test_scratch_remembers_few_views():
    for size in range(1, 10 * memory.MAX_VIEWS):
        memory.scratch.rows(1, size, CPU)
    assert len(memory.scratch._rows) <= memory.MAX_VIEWS


def test_gradients_are_neither_needed_nor_made(cases):
    """Called in a training loop, under any grad mode, with parameters as inputs and output."""
    theta = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.full((5,), 3.0))
    out = torch.nn.Parameter(torch.zeros(5))
    rule = WeightedSum(np.array([0.5, 0.5]))
    dispatch.backend("torch").apply([Piece(Inputs(tuple(map(Span.of, theta))), rule, Span.of(out))])
    assert out.tolist() == [2.0] * 5
    (out * 2).sum().backward()
    assert out.grad.tolist() == [2.0] * 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "rule_name", ["weighted_sum", "fisher", "task_mean", "ties", "dare_ties", "near_swap"]
)
def test_a_gpu_gives_the_bits_of_the_cpu(cases, rule_name):
    num_models = 1 if rule_name == "near_swap" else 3
    piece = cases.piece(rule_name, num_models, 3_000_001, ("bfloat16", "float32"), "bfloat16")

    def moved(span):
        return None if span is None else Span.of(span.data.cuda())

    inputs = replace(
        piece.inputs,
        theta=tuple(map(moved, piece.inputs.theta)),
        base=moved(piece.inputs.base),
        fisher=tuple(map(moved, piece.inputs.fisher)),
    )
    on_gpu = Piece(inputs, piece.rule, moved(piece.out))
    backend = dispatch.backend("torch")
    assert backend.apply([on_gpu]).tolist() == backend.apply([piece]).tolist()
    cases.assert_same([on_gpu], [piece])
    assert np.array_equal(backend.gram(inputs), backend.gram(piece.inputs))
    assert np.array_equal(backend.histogram(inputs, None), backend.histogram(piece.inputs, None))
    prefixes = [0x3F00] * num_models
    assert np.array_equal(backend.histogram(inputs, prefixes), backend.histogram(piece.inputs, prefixes))
    bounds = [(0x3F000000, 0x3F800000)] * num_models
    for each, expected in zip(
        backend.sift(inputs, bounds, 100), backend.sift(piece.inputs, bounds, 100), strict=True
    ):
        assert np.array_equal(each, expected)
    place = backend.nth_equal(inputs, 0, 0x3F000000, 7)
    assert place == backend.nth_equal(piece.inputs, 0, 0x3F000000, 7)
    assert np.array_equal(backend.non_finite(inputs), backend.non_finite(piece.inputs))
