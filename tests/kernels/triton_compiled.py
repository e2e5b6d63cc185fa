"""What Triton compiles our kernels to, for a GPU that need not be there.

test_triton_backend.py runs this in a process of its own. By hand: python -m pytest tests/kernels/triton_compiled.py
"""

import itertools
import re

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from toolkit_kernels import dispatch
from toolkit_kernels.rules import Inputs, Piece, WeightedSum
from toolkit_kernels.spans import Span
from toolkit_kernels.triton_backend import elementwise, reductions, rows
from toolkit_kernels.triton_backend.launch import OPTIONS

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"rows": "*i64", "chunks": "*i32", "counts": "*i64"}


def ptx(kernel, pointers, **constants) -> str:
    """The assembly of a kernel."""
    signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    return triton.compile(source, target=HOPPER, options=OPTIONS).asm["ptx"]


def variant(rule: str, theta: str, num_models: int = 4, out: str = "bfloat16", **settings) -> rows.Variant:
    unrolled = num_models <= rows.UNROLLED
    dtypes = (theta,) * num_models if unrolled else ()
    base = theta if rule in ("Consensus", "NearSwap") else None
    fisher = ("float32",) * len(dtypes) if rule == "FisherMean" else ()
    return rows.Variant(rule, out, base, dtypes, fisher, num_models, unrolled, **settings)


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


@pytest.mark.parametrize(
    ("rule", "out"),
    [
        *itertools.product(["WeightedSum"], ["bfloat16", "float16", "float32", "float64"]),
        *itertools.product(["FisherMean", "Consensus", "NearSwap"], ["bfloat16"]),
    ],
)
def test_every_rounding_is_ieee(rule, out):
    """No multiplication fused with an addition, division to nearest even, no subnormal flushed to zero."""
    flags = {"elect": True, "normalize": True, "trimmed": True, "random": True} if rule == "Consensus" else {}
    models = 1 if rule == "NearSwap" else 4
    text = ptx(elementwise.apply_kernel, POINTERS, variant=variant(rule, "bfloat16", models, out, **flags))
    assert count(r"\bfma\.", text) == 0
    assert count(r"\.ftz", text) == 0
    assert count(r"\bdiv\.", text) == count(r"\bdiv\.rn\.f64", text)
    assert (count(r"\bdiv\.rn\.f64", text) > 0) == (rule != "WeightedSum")
    assert (count(r"\bcvt\.rn\.f32\.f64", text) > 0) == (out != "float64" or rule == "Consensus")


@pytest.mark.parametrize("theta", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("num_models", [4, 17])
def test_a_thread_reads_and_writes_16_bytes_at_once(theta, num_models):
    """As many wide loads as the elements of a thread need, before the tail's narrow ones."""
    wanted = variant("WeightedSum", theta, num_models, theta)
    text = ptx(elementwise.apply_kernel, POINTERS, variant=wanted)
    wide_loads, wide_stores = (count(rf"\b{op}\.global\.v(?:4\.b32|2\.b64)", text) for op in ("ld", "st"))
    width = {"bfloat16": 8, "float16": 8, "float32": 4, "float64": 2}
    per_thread = wanted.block // (32 * OPTIONS["num_warps"])
    if num_models <= rows.UNROLLED:
        assert wide_loads == num_models * per_thread // width[theta]
    else:  # one model at a time, of any dtype
        assert wide_loads >= sum(per_thread // each for each in width.values())
    assert wide_stores >= per_thread // width[theta]


def test_an_odd_address_is_read_element_by_element():
    text = ptx(elementwise.apply_kernel, POINTERS, variant=variant("WeightedSum", "bfloat16", aligned=False))
    assert count(r"\b(?:ld|st)\.global\.v", text) == 0


def test_numbers_of_a_rule_are_read_not_compiled_in():
    """All weights share one kernel: a kernel's variant holds none."""
    names = set(rows.Variant.__dataclass_fields__)
    assert names.isdisjoint({"weights", "scale", "floors", "start", "size", "key"})


@pytest.mark.parametrize("base", [None, "bfloat16"])
def test_passes_compile(base):
    ints = {"num_models": "i32"}
    pass_constants = {"base": base, "aligned": True, "block": 2048}
    counts = {"row": "*i64", "counts": "*i64"}
    gram = ptx(
        reductions.gram_kernel,
        {"row": "*i64", "sums": "*fp64", **ints, "num_blocks": "i32"},
        base=base,
        aligned=True,
        num_rows=4,
    )
    assert count(r"\bfma\.", gram) == 0
    histogram = {**counts, "prefixes": "*i32", **ints}
    for lower in (False, True):
        text = ptx(reductions.histogram_kernel, histogram, lower=lower, num_copies=8, **pass_constants)
        assert count(r"\b(?:red|atom)\.global[\w.]*add", text) > 0
    assert ptx(reductions.non_finite_kernel, {**counts, **ints}, **pass_constants)
    addresses = dict.fromkeys(("total", "values", "size", "scale_bits"), "i64")
    squares = ptx(reductions.add_squares_kernel, addresses, dtype="bfloat16", aligned=True, block=2048)
    assert count(r"\bfma\.", squares) == 0
    assert count(r"\bld\.global\.v4", squares) > 0


@pytest.mark.parametrize("record", ["HEAD", "MODEL"])
def test_columns_are_numbered_as_the_rows_are_laid_out(record):
    dtype = getattr(rows, record)
    for number, name in enumerate(dtype.names):
        assert getattr(rows, name.upper()).value == number
        assert dtype.fields[name][1] == 8 * number
    assert getattr(rows, f"{record}_COLUMNS").value == len(dtype.names)


def test_memory_of_the_cpu_is_refused():
    x = Span.of(torch.ones(3))
    with pytest.raises(ValueError, match="memory of the CPU"):
        dispatch.backend("triton").apply([Piece(Inputs((x,)), WeightedSum(np.ones(1)), x)])
