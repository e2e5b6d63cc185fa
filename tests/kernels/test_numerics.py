"""How good the numbers are: one rounding, formulas that hold exactly, no model left out."""

import functools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from toolkit_kernels import reference as by_formula
from toolkit_kernels.rules import Consensus, FisherMean, Inputs, Keep, Piece, WeightedSum
from toolkit_kernels.spans import Span

SUMS = ["weighted_sum", "base_and_sum", "fisher", "task_arithmetic", "ties", "dare_ties"]


def run(cases, backend, rule, theta, out_dtype="float64", base=None, fisher=(), start=0) -> Span:
    out = cases.empty(theta[0].size, out_dtype, "torch")
    backend.apply([Piece(Inputs(tuple(theta), base, tuple(fisher), start), rule, out)])
    return out


@functools.cache
def unrounded(cases, reference, rule_name) -> Piece:
    """The reference's float64 for four models of mixed dtypes."""
    piece = cases.piece(rule_name, 4, 200_003, ("bfloat16", "float32"), "float64")
    reference.apply([piece])
    return piece


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rule_name", SUMS)
def test_the_result_is_the_reference_rounded_once(cases, backend, reference, rule_name, dtype):
    """Backends round to float32 first: equal to one rounding on 99.9 % of the elements, never more than 1 ulp off."""
    exact = unrounded(cases, reference, rule_name)
    piece = cases.with_out(exact, cases.empty(exact.out.size, dtype, "torch"))
    backend.apply([piece])
    once_N = by_formula.rounded_once(by_formula.read(exact.out), dtype)
    result_N = by_formula.read(piece.out)
    assert np.mean(result_N == once_N) >= 0.999
    assert np.all(np.abs(result_N - once_N) <= by_formula.ulp_of(once_N, dtype))


def test_rounding_twice_differs_where_it_must(cases, any_backend):
    """Just above the middle of two numbers of bfloat16, by less than float32 holds: the one known difference."""
    above_the_middle = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    theta = Span.of(above_the_middle)
    out = run(cases, any_backend, WeightedSum(np.array([1.0])), [theta], "bfloat16")
    assert by_formula.read(out).tolist() == [1.0, 1.0, 1 + 2.0**-6]
    assert by_formula.rounded_once(above_the_middle, "bfloat16").tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-6]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounding_once_against_numpy(dtype):
    """numpy rounds float64 to float16 and float32 once; every binade, its middles, subnormals and overflow."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(50_000) * np.exp2(generator.integers(-160, 140, 50_000))
    middles = by_formula.rounded_once(values, dtype) + by_formula.ulp_of(values, dtype) / 2
    largest = float(np.finfo(dtype).max)
    overflow = largest + by_formula.ulp_of(np.array([largest]), dtype)[0] / 2
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, largest, overflow, np.nextafter(overflow, 0), -overflow]
    values = np.concatenate([values, middles, -middles, special])
    with np.errstate(over="ignore"):
        expected = values.astype(dtype).astype(np.float64)
    assert np.array_equal(by_formula.rounded_once(values, dtype), expected, equal_nan=True)


def test_rounding_once_to_bfloat16_is_nearest_and_even():
    generator = np.random.default_rng(0)
    values = generator.standard_normal(2_000) * np.exp2(generator.integers(-140, 126, 2_000))
    for value, rounded in zip(values, by_formula.rounded_once(values, "bfloat16"), strict=True):
        ulp = Fraction(float(by_formula.ulp_of(np.array([value]), "bfloat16")[0]))
        distance = abs(Fraction(float(value)) - Fraction(float(rounded)))
        assert Fraction(float(rounded)) % ulp == 0
        assert distance <= ulp / 2
        if distance == ulp / 2:
            assert Fraction(float(rounded)) / ulp % 2 == 0


def exact_sum(rule_name, piece, i) -> Fraction:
    """The formula for element i in rational numbers."""

    def at(span):
        return Fraction(float(by_formula.read(span.part(i, 1))[0]))

    theta = [at(span) for span in piece.inputs.theta]
    weights = [Fraction(float(w)) for w in piece.rule.weights]
    if rule_name == "fisher":
        information = [w * at(f) for w, f in zip(weights, piece.inputs.fisher, strict=True)]
        if sum(information):
            return sum(f * t for f, t in zip(information, theta, strict=True)) / sum(information)
        weights = [Fraction(float(w)) for w in piece.rule.fallback]
    if rule_name == "task_arithmetic":
        base = at(piece.inputs.base)
        delta = sum(w * (t - base) for w, t in zip(weights, theta, strict=True))
        return base + Fraction(piece.rule.scale) * delta
    total = sum(w * t for w, t in zip(weights, theta, strict=True))
    if rule_name == "base_and_sum":
        total += Fraction(piece.rule.base_weight) * at(piece.inputs.base)
    return total


@pytest.mark.parametrize("rule_name", ["weighted_sum", "base_and_sum", "fisher", "task_arithmetic"])
def test_float32_is_within_one_ulp_of_the_truth(cases, any_backend, rule_name):
    """The truth in rational numbers, so that the float64 of the reference is under test, too."""
    piece = cases.piece(rule_name, 5, 1_500, ("float32",), "float32")
    any_backend.apply([piece])
    result_N = by_formula.read(piece.out)
    for i, result in enumerate(result_N):
        truth = exact_sum(rule_name, piece, i)
        ulp = by_formula.ulp_of(np.array([float(truth)]), "float32")[0]
        assert abs(Fraction(float(result)) - truth) <= Fraction(float(ulp)), i


@pytest.mark.parametrize("num_models", [1, 2, 3, 5, 7, 16, 17, 40])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_equal_models_come_back_bit_for_bit(cases, any_backend, dtype, num_models):
    """Whatever the weights, if they add up to 1; every exponent, subnormals and zeros of either sign among them."""
    generator = np.random.default_rng(num_models)
    with np.errstate(over="ignore"):
        values = generator.standard_normal(5_000) * np.exp2(generator.integers(-150, 15, 5_000))
    theta = cases.span(np.concatenate([values, [0.0, -0.0]]), dtype)
    fisher = [cases.span(row, "float32") for row in cases.fishers(generator, num_models, theta.size)]
    uneven = generator.random(num_models) + 0.01
    for weights in (np.full(num_models, 1 / num_models), uneven / uneven.sum()):
        theta_K = [theta] * num_models
        mean = run(cases, any_backend, WeightedSum(weights), theta_K, dtype)
        assert np.array_equal(cases.bits(mean), cases.bits(theta))
        rule = FisherMean(weights, np.zeros(num_models), weights)
        mean = run(cases, any_backend, rule, theta_K, dtype, fisher=fisher)
        assert np.array_equal(cases.bits(mean), cases.bits(theta))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_two_models_at_one_half_are_the_midpoint(cases, any_backend, dtype):
    generator = np.random.default_rng(0)
    a, b = (cases.span(generator.standard_normal(10_001), dtype) for _ in range(2))
    middle = (by_formula.read(a) + by_formula.read(b)) / 2  # exact in float64
    out = run(cases, any_backend, WeightedSum(np.array([0.5, 0.5])), [a, b], dtype)
    assert np.array_equal(by_formula.read(out), by_formula.rounded_once(middle, dtype))


@pytest.mark.parametrize("num_models", [2, 3, 16, 17, 40])
@pytest.mark.parametrize("rule_name", ["weighted_sum", "base_and_sum", "fisher", "task_mean", "ties", "dare"])
def test_no_model_is_left_out(cases, any_backend, rule_name, num_models):
    """Zeroing any one of them changes the result."""
    piece = cases.piece(rule_name, num_models, 1_100, ("float32",), "float32")
    any_backend.apply([piece])
    zero = cases.span(np.zeros(piece.out.size))
    changed = []
    for k in range(num_models):
        theta = (*piece.inputs.theta[:k], zero, *piece.inputs.theta[k + 1 :])
        changed.append(cases.with_out(replace(piece, inputs=replace(piece.inputs, theta=theta))))
    any_backend.apply(changed)
    for k, other in enumerate(changed):
        assert np.mean(cases.bits(other.out) != cases.bits(piece.out)) > 0.1, k


def test_fisher_falls_back_where_it_knows_nothing(cases, any_backend):
    """0 / 0 becomes the plain mean of ``fallback``; one model with information takes it all."""
    theta = [cases.span(np.array(row)) for row in ([1.0, 1.0, 1.0], [5.0, 5.0, 5.0])]
    fisher = [cases.span(np.array(row)) for row in ([0.0, 0.0, 2.0], [0.0, 1e-30, 6.0])]
    rule = FisherMean(np.array([0.5, 0.5]), np.zeros(2), np.array([0.75, 0.25]))
    out = run(cases, any_backend, rule, theta, fisher=fisher)
    assert by_formula.read(out).tolist() == [0.75 * 1 + 0.25 * 5, 5.0, (2 * 1 + 6 * 5) / 8]


def test_fisher_floor_is_what_the_caller_says(cases, any_backend):
    """f = max(F, floor) in the units of F: nothing is added, and a floor of zero is none."""
    theta = [cases.span(np.array([1.0, 1.0])), cases.span(np.array([5.0, 5.0]))]
    fisher = [cases.span(np.array([1e-12, 3e-10])), cases.span(np.array([3e-10, 1e-10]))]
    for floor, expected in ((0.0, None), (1e-10, [2.0 + 2.0, 2.0]), (1.0, [3.0, 3.0])):
        rule = FisherMean(np.ones(2), np.full(2, floor), np.full(2, 0.5))
        result = by_formula.read(run(cases, any_backend, rule, theta, fisher=fisher))
        if expected is None:
            expected = [(1e-12 + 5 * 3e-10) / (1e-12 + 3e-10), 2.0]
        assert np.allclose(result, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("power", [-60, -1, 40])
def test_fisher_knows_no_units(cases, any_backend, power):
    """F and its floor times a power of two: the same bits. Values of 1e-16, as Adam's second moments have, are as good
    as values of 1."""
    piece = cases.piece("fisher_floor", 4, 3_000, ("float32",), "float32")
    fisher = tuple(
        cases.span(by_formula.read(f) * 2.0**power, "float64", "torch") for f in piece.inputs.fisher
    )
    rule = replace(piece.rule, floors=piece.rule.floors * 2.0**power)
    scaled = Piece(replace(piece.inputs, fisher=fisher), rule, cases.empty(3_000, "float32", "torch"))
    any_backend.apply([piece, scaled])
    cases.assert_same([scaled], [piece])
    unscaled_floor = replace(scaled, rule=piece.rule, out=cases.empty(3_000, "float32", "torch"))
    any_backend.apply([unscaled_floor])
    assert np.any(cases.bits(unscaled_floor.out) != cases.bits(piece.out))


def test_dare_keeps_the_asked_share_and_the_mean(cases, any_backend):
    """E[mask / p] = 1: over 200,000 elements the share lies within 5 standard deviations, 0.56 %."""
    size, probability = 200_000, 0.3
    ones, zeros = cases.span(np.ones(size)), cases.span(np.zeros(size))
    keep = (Keep(probability=probability, key=(1, 2), rescale=1 / probability),)
    rule = Consensus(np.ones(1), keep, elect=False, normalize=False, scale=1.0)
    out_N = by_formula.read(run(cases, any_backend, rule, [ones], base=zeros))
    assert set(out_N.tolist()) == {0.0, 1 / probability}
    assert abs(out_N.mean() - 1) < 5 * np.sqrt((1 / probability - 1) / size)


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1e-12])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_squares_are_added_with_one_rounding(cases, any_backend, dtype, scale):
    generator = np.random.default_rng(0)
    total_N = np.abs(generator.standard_normal(40_001)) * np.exp2(generator.integers(-40, 3, 40_001))
    total, values = cases.span(total_N), cases.span(cases.parameters(generator, 40_001), dtype, "torch_odd")
    value_N, before_N = by_formula.read(values), by_formula.read(total)
    any_backend.add_squares(total, values, scale)
    expected = (before_N + (scale * value_N) * value_N).astype(np.float32)
    assert np.array_equal(total.data.numpy(), expected)
    any_backend.add_squares(Span.of(torch.empty(0)), Span.of(torch.empty(0)))
