"""The order of models: decided by all that can change the result, and by no more reading than that takes."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from toolkit.merging.group import PIECE_SIZE, FisherTensor, MemoryReader, TensorGroup
from toolkit.merging.order import NUM_STRETCHES, STRETCH, canonical_order
from toolkit.merging.registry import merge_methods
from toolkit_kernels import dispatch
from toolkit_kernels.spans import Span

SIZE = 4 * PIECE_SIZE + 3


@dataclass
class CountingReader:
    """A tensor in memory that remembers which elements were read."""

    values: np.ndarray
    read: list[tuple[int, int]] = field(default_factory=list)
    dtype = "float32"
    where = "memory"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def span(self, start: int, size: int) -> Span:
        self.read.append((start, size))
        return Span.of(self.values[start : start + size])


def group_of(models, fisher=()) -> TensorGroup:
    backend = dispatch.backend("reference")
    return TensorGroup("a", models[0].shape, tuple(models), None, backend, tuple(fisher))


def arguments_of(method: str, **per_model) -> dict:
    defaults = {p.argument: np.ones(2) for p in merge_methods()[method].parameters if p.per_model}
    return defaults | {name: np.asarray(values, np.float64) for name, values in per_model.items()}


def test_different_samples_are_all_that_is_read() -> None:
    models = [CountingReader(np.full(SIZE, value, np.float32)) for value in (2.0, 1.0)]
    assert sorted(canonical_order(group_of(models), merge_methods()["linear"], arguments_of("linear"))) == [
        0,
        1,
    ]
    for model in models:
        assert sum(size for _, size in model.read) == NUM_STRETCHES * STRETCH


def test_weights_that_differ_need_no_reading() -> None:
    models = [CountingReader(np.zeros(SIZE, np.float32)) for _ in range(2)]
    arguments = arguments_of("linear", weight=[1.0, 2.0])
    assert canonical_order(group_of(models), merge_methods()["linear"], arguments) == [1, 0]
    assert models[0].read == []


def test_reading_goes_piece_by_piece_and_ends_at_the_first_that_differs() -> None:
    values = np.zeros((2, SIZE), np.float32)
    values[0, PIECE_SIZE + 999] = 1.0  # in no sample
    models = [CountingReader(row) for row in values]
    assert canonical_order(group_of(models), merge_methods()["linear"], arguments_of("linear")) == [1, 0]
    for model in models:
        whole = [(start, size) for start, size in model.read if size != STRETCH]
        assert whole == [(0, PIECE_SIZE), (PIECE_SIZE, PIECE_SIZE)]


def test_nothing_is_asked_for_as_a_whole_even_where_models_are_alike() -> None:
    models = [CountingReader(np.zeros(SIZE, np.float32)) for _ in range(3)]
    arguments = {"weight": np.ones(3)}
    assert canonical_order(group_of(models), merge_methods()["linear"], arguments) == [0, 1, 2]
    assert max(size for model in models for _, size in model.read) == PIECE_SIZE


@pytest.mark.parametrize(
    ("method", "name"),
    [("ties", "density"), ("breadcrumbs", "gamma"), ("della", "epsilon"), ("dare_ties", "density")],
)
def test_equal_tensors_are_told_apart_by_every_number(method: str, name: str) -> None:
    models = [CountingReader(np.zeros(10, np.float32)) for _ in range(2)]
    chosen = merge_methods()[method]
    for values, expected in (([0.2, 0.3], [0, 1]), ([0.3, 0.2], [1, 0])):
        assert canonical_order(group_of(models), chosen, arguments_of(method, **{name: values})) == expected


@pytest.mark.parametrize("size", [10, SIZE])
def test_equal_tensors_are_told_apart_by_their_fishers(size: int) -> None:
    """By norms, which are known; where these are equal too, by the elements."""
    models = [CountingReader(np.zeros(size, np.float32)) for _ in range(2)]
    rows = np.zeros((2, size), np.float32)
    rows[0, 5] = rows[1, 7] = 1.0
    for norms in ([1.0, 1.0], [1.0, 2.0]):
        entries = [
            FisherTensor(MemoryReader(Span.of(row), (size,), "float32", "F"), 0.1, norm, norm)
            for row, norm in zip(rows, norms, strict=True)
        ]
        orders = []
        for places in itertools.permutations(range(2)):
            group = group_of(models, [entries[k] for k in places])
            order = canonical_order(group, merge_methods()["fisher"], arguments_of("fisher"))
            orders.append([places[k] for k in order])
        assert orders[0] == orders[1], norms


def test_equal_tensors_are_told_apart_by_products_of_their_inputs() -> None:
    torch = pytest.importorskip("torch")
    from toolkit.merging.methods.grams import Grams

    models = [CountingReader(np.zeros(10, np.float32)) for _ in range(2)]
    grams = [Grams({"a": torch.eye(3) * value}, 1) for value in (2.0, 1.0)]
    for given in (grams, ["b.safetensors", "a.safetensors"]):
        orders = []
        for places in itertools.permutations(range(2)):
            arguments = {"weight": np.ones(2), "gram": [given[k] for k in places]}
            order = canonical_order(group_of(models), merge_methods()["regmean"], arguments)
            orders.append([places[k] for k in order])
        assert orders[0] == orders[1]
