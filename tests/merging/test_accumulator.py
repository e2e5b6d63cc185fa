"""States that arrive one by one."""

import itertools

import psutil
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5])
def test_what_is_no_fisher_information_leaves_the_sums_as_they_were(value: float) -> None:
    total, fisher = Accumulator(), {n: torch.rand(s) for n, s in SHAPES.items()}
    total.add(state(0), 1.0, fisher)
    before = total.result()
    bad = {name: tensor.clone() for name, tensor in fisher.items()}
    bad["d"][-1] = value
    with pytest.raises(ModelError, match=rf"the Fisher of client 7: d holds {value:g}"):
        total.add(state(1), 1.0, bad, label="client 7")
    assert all(torch.equal(before[n], total.result()[n]) for n in SHAPES)


def test_later_states_and_outputs_lie_where_the_first_did() -> None:
    total, fisher = Accumulator(), {n: torch.rand(s) for n, s in SHAPES.items()}
    total.add(state(0), 1.0, fisher)
    elsewhere = {name: tensor.to("meta") for name, tensor in state(1).items()}
    with pytest.raises(InputError, match=r"a of the first state on cpu, a of state 1 on meta"):
        total.add(elsewhere, 1.0, fisher)
    with pytest.raises(InputError, match=r"a of the Fisher of state 1 on meta"):
        total.add(state(1), 1.0, {name: elsewhere[name] for name in SHAPES})
    with pytest.raises(InputError, match=r"a of out on meta"):
        total.result(elsewhere)


def test_a_result_is_not_written_to_outputs_that_are_one_tensor() -> None:
    total, one = Accumulator(), {"a": torch.zeros(5), "b": torch.ones(5)}
    total.add(one)
    both = torch.empty(5)
    with pytest.raises(InputError, match="one tensor, and in the mean they differ"):
        total.result({"a": both, "b": both})
    total = Accumulator()
    total.add({"a": one["b"], "b": one["b"]})
    assert total.result({"a": both, "b": both})["a"].tolist() == [1.0] * 5


def test_float8_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"a: state 0 has torch\.float8_e4m3fn"):
        Accumulator().add({"a": torch.zeros(3).to(torch.float8_e4m3fn)})


@pytest.mark.parametrize("with_fisher", [False, True])
def test_thousands_of_states_are_what_a_merge_of_all_gives(with_fisher: bool) -> None:
    """Rounds of a federated run: one state object that changes, sums that do not grow."""
    generator, shapes = torch.Generator().manual_seed(0), {"a": (6, 5), "b": (3,)}
    total, one, fisher, process, before = Accumulator(num_threads=1), {}, {}, psutil.Process(), 0
    expected = {n: [torch.zeros(s, dtype=torch.float64) for _ in range(2)] for n, s in shapes.items()}
    for step in range(3000):
        one |= {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        fisher |= {n: torch.rand(s, generator=generator) for n, s in shapes.items()}
        weight = 1.0 + step % 7
        total.add(one, weight, fisher if with_fisher else None)
        for name, sums in expected.items():
            importance = weight * (fisher[name].double() if with_fisher else torch.tensor(1.0).double())
            sums[0] += importance * one[name].double()
            sums[1] += importance
        if step == 1000:
            before = process.memory_info().rss
    assert total.num_added == 3000
    mean = total.result()
    for name, (numerator, denominator) in expected.items():
        torch.testing.assert_close(mean[name], (numerator / denominator).float(), rtol=2e-7, atol=1e-9)
    assert process.memory_info().rss - before < 10e6
