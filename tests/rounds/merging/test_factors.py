"""Factors of a mean of products that stay near the mean factors."""

import numpy as np
import pytest
import torch

from toolkit.merging.lora.rank_space import Factors
from toolkit.rounds.merging.factors import factor_pairs, mean_is_exact, mean_product, near_mean, product_error


def pair_of(state):
    (pair,) = factor_pairs(state)
    return pair


def adapters(number, *, a=None, rank=4, apart=0.1, seed=0):
    """States of one module: A near a common one, B small."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rank, 30, generator=generator) if a is None else a
    return [
        {
            "m.lora_A.weight": shared + apart * torch.randn(rank, 30, generator=generator),
            "m.lora_B.weight": 0.1 * torch.randn(20, rank, generator=generator),
        }
        for _ in range(number)
    ]


def mean(states, name, weights):
    return sum(w * s[name].double() for w, s in zip(weights, states, strict=True))


def product(state):
    return state["m.lora_B.weight"].double() @ state["m.lora_A.weight"].double()


def far(first, second):
    return float(torch.linalg.norm(first.double() - second) / torch.linalg.norm(second))


def test_where_the_mean_of_factors_is_exact_it_comes_out():
    states, weights = adapters(3, apart=0.0), [0.5, 0.3, 0.2]
    assert mean_is_exact(states, pair_of(states[0]))
    merged, error = mean_product(states, weights, pair_of(states[0]))
    for name in merged:
        assert far(merged[name], mean(states, name, weights)) < 1e-6
    assert error.relative < 1e-12


@pytest.mark.parametrize("apart", [0.01, 0.1, 1.0])
def test_the_product_is_the_best_of_its_rank(apart):
    states, weights = adapters(4, apart=apart), [0.4, 0.3, 0.2, 0.1]
    pair = pair_of(states[0])
    merged, error = mean_product(states, weights, pair)
    exact = sum(w * product(s) for w, s in zip(weights, states, strict=True)).numpy()
    u, values, vt = np.linalg.svd(exact)
    best = torch.from_numpy((u[:, :4] * values[:4]) @ vt[:4])
    assert far(product(merged), best) < 1e-6
    assert error.error == pytest.approx(np.linalg.norm(values[4:]), rel=1e-9)
    assert error.norm == pytest.approx(np.linalg.norm(values), rel=1e-9)
    assert product_error(merged, states, weights, pair).error == pytest.approx(error.error, rel=1e-5)


def test_factors_stay_near_the_mean_factors():
    """Kept moments of an optimizer are of these elements; a balanced SVD's factors are others altogether."""
    states, weights = adapters(4, apart=0.02), [0.25] * 4
    merged, _ = mean_product(states, weights, pair_of(states[0]))
    for name in merged:
        assert far(merged[name], mean(states, name, weights)) < 0.15, name


def test_directions_that_the_product_does_not_use_keep_their_mean():
    states = adapters(3, apart=0.1)
    for state in states:
        state["m.lora_B.weight"].zero_()
    merged, error = mean_product(states, [0.5, 0.25, 0.25], pair_of(states[0]))
    assert not merged["m.lora_B.weight"].any()
    assert far(merged["m.lora_A.weight"], mean(states, "m.lora_A.weight", [0.5, 0.25, 0.25])) < 1e-7
    assert (error.error, error.norm, error.relative) == (0.0, 0.0, 0.0)
    for state in states:  # one direction of four, the same for all
        state["m.lora_B.weight"][:, 2] = torch.randn(20)
        state["m.lora_A.weight"][2] = states[0]["m.lora_A.weight"][2]
    merged, _ = mean_product(states, [0.5, 0.25, 0.25], pair_of(states[0]))
    assert far(merged["m.lora_A.weight"], mean(states, "m.lora_A.weight", [0.5, 0.25, 0.25])) < 1e-6


def test_factors_that_cancel_in_the_mean():
    """A and -A, B and -B: the same product, and a mean A of zero."""
    (first,) = adapters(1)
    second = {name: -tensor for name, tensor in first.items()}
    merged, error = mean_product([first, second], [0.5, 0.5], pair_of(first))
    assert far(product(merged), product(first)) < 1e-6
    assert error.relative < 1e-12
    assert max(float(tensor.abs().max()) for tensor in merged.values()) < 50


def test_near_mean_is_exact_for_any_gauge():
    generator = np.random.default_rng(0)
    u, _ = np.linalg.qr(generator.normal(size=(20, 4)))
    v, _ = np.linalg.qr(generator.normal(size=(30, 4)))
    root = np.sqrt([5.0, 1.0, 1e-3, 1e-6])
    given = Factors(u * root, root[:, None] * v.T, 0.0, 5.1)
    for scale in (0.0, 1e-6, 1.0, 1e3):
        b, a = near_mean(given, scale * generator.normal(size=(4, 30)), shortest=0.1)
        assert np.linalg.norm(b @ a - given.b @ given.a) < 1e-9, scale


def test_convolutions_and_embeddings_are_products_too():
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            "c.lora_A.weight": torch.randn(2, 3, 5, 5, generator=generator),
            "c.lora_B.weight": torch.randn(7, 2, 1, 1, generator=generator),
            "e.lora_embedding_A": torch.randn(2, 50, generator=generator),
            "e.lora_embedding_B": torch.randn(9, 2, generator=generator),
        }
        for _ in range(2)
    ]
    pairs = factor_pairs(states[0])
    assert [pair.module for pair in pairs] == ["c", "e"]
    for pair in pairs:
        merged, error = mean_product(states, [0.5, 0.5], pair)
        assert merged[pair.a].shape == states[0][pair.a].shape
        assert merged[pair.b].shape == states[0][pair.b].shape
        assert 0 < error.relative < 1
        assert product_error(merged, states, [0.5, 0.5], pair).relative == pytest.approx(
            error.relative, rel=1e-5
        )


def test_names_that_are_no_pairs():
    state = {
        "m.lora_A.weight": torch.ones(1),
        "m.lora_magnitude_vector": torch.ones(1),
        "head.weight": torch.ones(1),
    }
    assert factor_pairs(state) == []
