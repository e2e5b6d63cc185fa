"""What a launch knows beside the elements: the variant it was compiled for, and one row of numbers for each tensor.

A row is made of columns of 8 bytes: those of HEAD, then those of MODEL once for each model. Kernels read int64 and take
the columns of type f8 for the bits of a float64; the constants below are the numbers of the columns.
"""

from dataclasses import dataclass

import numpy as np
import triton.language as tl

HEAD = np.dtype(
    [
        ("out", "i8"),  # address
        ("size", "i8"),  # elements
        ("start", "i8"),  # index, in the whole tensor, of the first of them
        ("piece", "i8"),  # which counter counts what is not finite
        ("base", "i8"),  # address
        ("scalar", "f8"),  # base_weight, scale or t
        ("negligible", "f8"),  # divisors up to this magnitude count as one
    ]
)
OUT, SIZE, START, PIECE, BASE, SCALAR, NEGLIGIBLE, HEAD_COLUMNS = map(tl.constexpr, range(8))

MODEL = np.dtype(
    [
        ("theta", "i8"),  # address
        ("theta_code", "i8"),  # dtype: see spans.CODES
        ("fisher", "i8"),
        ("fisher_code", "i8"),
        ("weight", "f8"),
        ("fallback", "f8"),
        ("floor", "f8"),
        ("rescale", "f8"),
        ("among", "i8"),  # rules.Threshold of which an element must be one
        ("among_last", "i8"),
        ("outside", "i8"),  # and of which it must be none
        ("outside_last", "i8"),
        ("key", "i8"),  # the first word below, the second above
        ("stream", "i8"),
        ("limit", "i8"),  # it stays if its random word is below this
    ]
)
THETA, THETA_CODE, FISHER, FISHER_CODE, WEIGHT, FALLBACK, FLOOR, RESCALE = map(tl.constexpr, range(8))
AMONG, AMONG_LAST, OUTSIDE, OUTSIDE_LAST, KEY, STREAM, LIMIT, MODEL_COLUMNS = map(tl.constexpr, range(8, 16))

# Up to this many models the loop over them is unrolled, and the loads of several are in flight at once.
UNROLLED = 16


@dataclass(frozen=True)
class Variant:
    """What is known when a kernel is compiled; tensors that differ in it are computed by different launches.

    Attributes:
        rule: name of the class of the rule.
        out, base: dtypes; base is None where the rule reads none.
        theta, fisher: dtypes for each model; empty where the loop over them is not unrolled: they stand in the row.
        num_models: K.
        unrolled: as far as UNROLLED models.
        elect, normalize: of rules.Consensus.
        trimmed: some model keeps only some elements by their magnitude.
        random: some model keeps elements at random.
        aligned: every address is a multiple of 16, so that a thread may read 16 bytes at once.
        block: elements that a program computes.
    """

    rule: str
    out: str
    base: str | None
    theta: tuple[str, ...]
    fisher: tuple[str, ...]
    num_models: int
    unrolled: bool = True
    elect: bool = False
    normalize: bool = False
    trimmed: bool = False
    random: bool = False
    aligned: bool = True
    block: int = 1024
