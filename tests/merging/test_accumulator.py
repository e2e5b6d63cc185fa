"""States that arrive one by one."""

import itertools

import pytest
import torch

from toolkit.errors import InputError, MergeError, ModelError
from toolkit.merging.accumulator import Accumulator
from toolkit.merging.memory import merge_state_dicts

SHAPES = {"a": (40, 30), "b": (5,), "c": (), "d": (300_000,)}


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()} | {
        "n": torch.tensor(3)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_mean_of_what_was_added_weighted_by_examples(dtype: torch.dtype) -> None:
    states, weights = [state(k, dtype) for k in range(3)], [30.0, 10.0, 2.0]
    total = Accumulator()
    for one, weight in zip(states, weights, strict=True):
        total.add(one, weight)
    mean = total.result()
    assert (total.total_weight, total.num_added) == (42.0, 3)
    for name in SHAPES:
        sums = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        expected = (sums / 42).to(dtype) if dtype == torch.float64 else (sums / 42).float().to(dtype)
        assert mean[name].dtype == dtype
        assert torch.equal(mean[name], expected), name
    assert mean["n"].item() == 3


def test_fisher_means_are_those_of_a_merge_of_all_at_once() -> None:
    states, fisher = (
        [state(k) for k in range(3)],
        [{n: torch.rand(s) for n, s in SHAPES.items()} for _ in range(3)],
    )
    for tensors in fisher:
        tensors["a"][:3] = 0
    total = Accumulator(fisher_floor=0.01)
    for k in range(3):
        total.add(states[k], k + 1.0, fisher[k])
    at_once = merge_state_dicts(
        states, "fisher", fisher=fisher, weight=[1.0, 2.0, 3.0], fisher_normalize="none", fisher_floor=0.01
    )
    mean = total.result()
    for name in SHAPES:
        torch.testing.assert_close(mean[name], at_once[name], rtol=3e-7, atol=0)


def test_every_order_of_arrival_gives_the_same_bits_in_float32() -> None:
    states = [state(k) for k in range(5)]
    results = []
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 11):
        total = Accumulator()
        for k in order:
            total.add(states[k], k + 1.0)
        results.append(total.result())
    assert all(torch.equal(results[0][n], other[n]) for other in results for n in SHAPES)


def test_what_was_added_may_change_afterwards_and_results_are_fresh() -> None:
    total, one = Accumulator(), state(0)
    kept = {name: tensor.clone() for name, tensor in one.items()}
    total.add(one)
    one["a"].zero_()
    first = total.result()
    assert torch.equal(first["a"], kept["a"])
    total.add(state(1))
    assert not torch.equal(total.result()["a"], first["a"])
    out = {name: torch.empty_like(tensor) for name, tensor in kept.items()}
    assert total.result(out)["a"] is out["a"]


def test_what_is_refused_leaves_the_sums_as_they_were() -> None:
    total = Accumulator()
    with pytest.raises(InputError, match="above zero"):
        total.result()
    total.add(state(0), 2.0)
    before = total.result()
    bad = state(1)
    bad["d"][123_456] = float("inf")
    with pytest.raises(MergeError, match="d: client 7 holds NaN or infinity"):
        total.add(bad, label="client 7")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="weight"):
            total.add(state(1), weight)
    with pytest.raises(InputError, match="Fisher"):
        total.add(state(1), 1.0, state(2))
    with pytest.raises(ModelError, match="lacks a"):
        total.add({n: t for n, t in state(1).items() if n != "a"})
    assert total.num_added == 1
    assert all(torch.equal(before[n], total.result()[n]) for n in SHAPES)
    total = Accumulator()
    total.add(state(0), 0.0)
    with pytest.raises(InputError, match="above zero"):
        total.result()
