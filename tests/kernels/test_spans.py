"""Typed memory, from numpy and from torch."""

import numpy as np
import pytest
import torch

from toolkit_kernels.spans import CODES, ITEMSIZES, Span


@pytest.mark.parametrize("dtype", list(CODES))
def test_a_span_of_a_tensor(dtype):
    tensor = torch.arange(24).to(getattr(torch, dtype)).view(2, 3, 4).requires_grad_()
    span = Span.of(tensor)
    assert (span.dtype, span.size, span.num_bytes) == (dtype, 24, 24 * ITEMSIZES[dtype])
    assert span.address == tensor.data_ptr()
    assert span.device == "cpu"
    assert not span.data.requires_grad
    part = span.part(5, 7)
    assert part.address == tensor.data_ptr() + 5 * ITEMSIZES[dtype]
    assert part.data.tolist() == list(range(5, 12))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_span_of_an_array(dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    span = Span.of(array)
    assert (span.dtype, span.size, span.device) == (dtype, 6, "cpu")
    assert span.address == array.ctypes.data
    span.part(1, 1).data[:] = 9
    assert array[0, 1] == 9


def test_bfloat16_in_numpy_is_its_bits():
    span = Span(np.zeros(3, dtype=np.uint16), "bfloat16")
    assert (span.size, span.num_bytes, span.code) == (3, 6, CODES["bfloat16"])


@pytest.mark.parametrize("values", [torch.zeros(3, dtype=torch.int64), np.zeros(3, dtype=np.uint16)])
def test_other_types_are_refused(values):
    with pytest.raises(TypeError, match=r"kernels know float16, bfloat16, float32, float64, not u?int"):
        Span.of(values)


@pytest.mark.parametrize(
    "values", [torch.zeros(4, 4).t(), torch.zeros(8)[::2], np.zeros((4, 4)).T, np.zeros(8)[::2]]
)
def test_memory_with_gaps_is_refused(values):
    with pytest.raises(ValueError, match="contiguous"):
        Span.of(values)


def test_nothing_and_one_number():
    assert Span.of(torch.tensor(3.0)).size == 1
    assert Span.of(torch.empty(0, 5)).size == 0
    assert Span.of(np.array(3.0)).size == 1
