"""Rows that are gathered while they are read equal those that numpy gathers."""

import numpy as np
import pytest
import torch

from toolkit.merging.group import MemoryReader
from toolkit.merging.recipes.rows import (
    FirstRows,
    GatheredRows,
    MeanOfAllRows,
    MeanRows,
    Zeros,
    gathered,
    widened,
)
from toolkit_kernels.spans import Span


def reader(values: np.ndarray, dtype: str = "float32") -> MemoryReader:
    if dtype == "bfloat16":
        return MemoryReader.of(torch.from_numpy(values).to(torch.bfloat16), "memory")
    values = values if values.dtype == dtype else values.astype(dtype)
    return MemoryReader(Span.of(values), values.shape, dtype, "memory")


def all_of(source) -> np.ndarray:
    size = int(np.prod(source.shape))
    return widened(source.span(0, size), "float64").reshape(source.shape)


@pytest.fixture
def table() -> np.ndarray:
    return np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_any_order_of_rows(table, dtype):
    rows = np.array([7, 8, 9, 0, 0, 3, 2])
    result = gathered([reader(table, dtype)], np.zeros(7, np.int64), rows)
    assert result.dtype == dtype
    assert result.shape == (7, 4)
    np.testing.assert_array_equal(all_of(result), table[rows])


def test_every_window_of_it(table):
    rows = np.array([5, 6, 1, 9, 0])
    result = gathered([reader(table)], np.zeros(5, np.int64), rows)
    flat = table[rows].reshape(-1)
    for start in range(20):
        for size in range(21 - start):
            np.testing.assert_array_equal(result.span(start, size).data, flat[start : start + size])


def test_rows_of_several_tensors_of_different_types(table):
    parts = [reader(table, "bfloat16"), reader(table + 100, "float16"), reader(-table)]
    part, row = np.array([0, 0, 1, 2, 1, 1]), np.array([0, 1, 2, 9, 0, 1])
    result = gathered(parts, part, row)
    assert result.dtype == "float32"
    expected = [table[0], table[1], table[2] + 100, -table[9], table[0] + 100, table[1] + 100]
    np.testing.assert_array_equal(all_of(result), np.stack(expected))


def test_a_tensor_that_stays_as_it_is_is_not_wrapped(table):
    own = reader(table)
    zeros = np.zeros(10, np.int64)
    assert gathered([own], zeros, np.arange(10)) is own
    first = gathered([own], zeros[:6], np.arange(6))
    assert isinstance(first, FirstRows)
    assert first.shape == (6, 4)
    assert isinstance(gathered([own], zeros[:6], np.arange(1, 7)), GatheredRows)


def test_a_view_is_returned_where_one_run_has_it_all(table):
    result = gathered([reader(table)], np.zeros(4, np.int64), np.array([4, 5, 6, 0]))
    assert np.shares_memory(result.span(2, 8).data, table)
    assert not np.shares_memory(result.span(10, 4).data, table)


def test_vectors_have_rows_of_one_element():
    bias = np.arange(6, dtype=np.float32)
    result = gathered([reader(bias)], np.zeros(3, np.int64), np.array([5, 0, 2]))
    np.testing.assert_array_equal(all_of(result), [5, 0, 2])


def test_means_of_rows_leave_out_who_has_none(table):
    means = MeanRows(
        (reader(table, "bfloat16"), reader(table + 1), reader(table * 3)), np.array([[0, 1, -1], [-1, 2, 3]])
    )
    expected = np.stack([(table[0] + table[1] + 1) / 2, (table[2] + 1 + table[3] * 3) / 2])
    np.testing.assert_array_equal(all_of(means), expected)
    np.testing.assert_array_equal(means.span(3, 3).data, expected.reshape(-1)[3:6])


def test_the_mean_of_all_rows_is_in_one_row(table):
    mean = MeanOfAllRows(reader(table, "bfloat16"))
    assert mean.shape == (1, 4)
    np.testing.assert_array_equal(mean.span(1, 2).data, table.mean(axis=0)[1:3])


def test_zeros():
    assert not Zeros((2, 3), "bfloat16").span(1, 4).data.any()


def test_bfloat16_of_torch_is_read_too(table):
    values = torch.from_numpy(table).to(torch.bfloat16).reshape(-1)
    np.testing.assert_array_equal(widened(Span(values, "bfloat16"), "float32"), table.reshape(-1))
