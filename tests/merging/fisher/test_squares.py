"""The sums of squares against their formula in float64."""

import pytest
import torch

from toolkit.merging.fisher import compiled, squares
from toolkit.merging.fisher.squares import Lookups, Products, Scratch


def reference(grad_BTO, input_BTI, lookups: Lookups | None = None) -> torch.Tensor:
    """Σ_b (Σ_t grad_bt ⊗ input_bt + Σ_s one-hot(id_bs) ⊗ grad_bs)² in float64."""
    g_BOI = torch.einsum("bto,bti->boi", grad_BTO.double(), input_BTI.double())
    if lookups is not None:
        for b, ids in enumerate(lookups.ids_BS):
            for s, row in enumerate(ids.tolist()):
                if row >= 0:
                    g_BOI[b, row] += lookups.grad_BSD[b, s].double()
    return (g_BOI**2).sum(0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(fisher: torch.Tensor, expected: torch.Tensor, relative: float = 2e-6) -> None:
    assert (fisher - expected).norm() <= relative * expected.norm()
    torch.testing.assert_close(fisher.double(), expected, rtol=1e-4, atol=1e-6 * expected.max().item())


@pytest.fixture(params=[True, False], ids=["compiled", "torch"], autouse=True)
def way(request, monkeypatch) -> None:
    """Every test with and without the compiled loop."""
    monkeypatch.setattr(squares, "IS_COMPILED", request.param)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("num_examples", [1, 5])
def test_products(num_examples, num_tokens) -> None:
    grad, value = random(num_examples, num_tokens, 12), random(num_examples, num_tokens, 9, seed=1)
    fisher = torch.full((12, 9), 3.0)
    squares.add_product_squares(fisher, Products(grad, value), Scratch())
    check(fisher - 3, reference(grad, value), 1e-5)


def test_products_larger_than_a_block() -> None:
    num_outputs = squares.BLOCK_NUM_ELEMENTS // 256 + 3
    grad, value = random(2, 3, num_outputs), random(2, 3, 256, seed=1)
    lookups = Lookups(
        torch.tensor([[0, num_outputs - 1, -1], [num_outputs - 4, 5, 5]]), random(2, 3, 256, seed=2)
    )
    fisher, scratch = torch.zeros(num_outputs, 256), Scratch()
    squares.add_product_squares(fisher, Products(grad, value), scratch, lookups)
    check(fisher, reference(grad, value, lookups))
    fisher.zero_()
    squares.add_product_squares(fisher, Products(grad, value), scratch)  # the scratch is used again
    check(fisher, reference(grad, value))


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 6), (0, 2), (0, 1)],  # padding on the right
        [(4, 6), (0, 6), (5, 6)],  # on the left
        [(0, 1), (0, 1), (0, 1)],  # only the first token counts
        [(2, 4), (0, 0), (3, 4)],  # an example without any
        [(0, 0), (0, 0), (0, 0)],
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_without_gradient_are_left_out(spans, transposed) -> None:
    grad, value = random(3, 6, 12), random(3, 6, 9, seed=1)
    for b, (start, stop) in enumerate(spans):
        grad[b, :start], grad[b, stop:] = 0, 0
    products = Products(value, grad, is_transposed=True) if transposed else Products(grad, value)
    assert squares._spans(products) == [(s, e) if e > s else (6, 6) for s, e in spans]
    expected = reference(products.grad_BTO, products.input_BTI)
    fisher = torch.zeros(expected.shape)
    squares.add_product_squares(fisher, products, Scratch())
    check(fisher, expected)
    lookups = Lookups(torch.tensor([[1], [2], [3]]), random(3, 1, fisher.shape[1]))
    fisher.zero_()
    squares.add_product_squares(fisher, products, Scratch(), lookups)
    check(fisher, reference(products.grad_BTO, products.input_BTI, lookups))


@pytest.mark.parametrize("num_outputs", [1, 3, 4, 5, 257])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_any_number_of_rows_and_threads(num_outputs, num_threads, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "MIN_PRODUCTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    grad, value = random(3, 9, num_outputs), random(3, 9, 17, seed=1)
    fisher = torch.zeros(num_outputs, 17)
    squares.add_product_squares(fisher, Products(grad, value), Scratch())
    check(fisher, reference(grad, value))


def test_lookups() -> None:
    ids = torch.tensor([[3, 1, 3, -1], [0, 3, 3, 3]])
    grad = random(2, 4, 5)
    fisher = torch.zeros(6, 5)
    squares.add_lookup_squares(fisher, Lookups(ids, grad))
    expected = reference(torch.zeros(2, 1, 6), torch.zeros(2, 1, 5), Lookups(ids, grad))
    check(fisher, expected)
    assert not fisher[[2, 4, 5]].any()


def test_vectors() -> None:
    grad = random(3, 4, 5)
    fisher = torch.zeros(5)
    squares.add_vector_squares(fisher, grad)
    check(fisher, (grad.double().sum(1) ** 2).sum(0))


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_the_way_of_accelerators_gives_the_same(num_tokens, monkeypatch) -> None:
    """Large products for all examples at once run on any device; several blocks, the last one smaller."""
    monkeypatch.setattr(squares, "DEVICE_NUM_ELEMENTS", 3 * 9 * 5)
    grad, value = random(3, num_tokens, 12), random(3, num_tokens, 9, seed=1)
    fisher = torch.zeros(12, 9)
    squares._add_in_batches(fisher, Products(grad, value), Scratch())
    check(fisher, reference(grad, value))


def test_low_precision_is_widened_before_it_is_multiplied() -> None:
    grad, value = random(2, 64, 12).bfloat16(), random(2, 64, 9, seed=1).bfloat16()
    fisher = torch.zeros(12, 9)
    squares.add_product_squares(fisher, Products(grad, value), Scratch())
    check(fisher, reference(grad, value))
