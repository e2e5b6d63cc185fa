"""What holds for every method: each parameter counts, no model is left out, equal models stay, edges are edges."""

import inspect

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.merging.methods.grams import Grams
from toolkit.merging.registry import REQUIRED, merge_methods

METHODS = merge_methods()
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]
NEED_BASE = [name for name, method in METHODS.items() if method.base == "required"]
ONE_MODEL = ["slerp", "nearswap", "passthrough", "arcee_fusion"]
# Their result has another spectrum, or a part of it, by design.
SPECTRAL = ["tsv_m", "iso_c"]
T = {"slerp": 0.3, "nearswap": 0.05}


def takes(method, others):
    return others.keys() <= {p.name for p in METHODS[method].parameters}


def grams_of(count, size=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(3 * size, size, generator=generator) * (0.5 + torch.rand(size)) for _ in range(count)
    ]
    return [Grams({"layer.weight": x.mT @ x / len(x)}, len(x)) for x in inputs]


def inputs_of(method, random_models, count=3, **sizes):
    """Models, base, Fisher and the parameters without which the method does not run."""
    count = 2 if method == "nuslerp" else 1 if method in ONE_MODEL else count
    models, base = random_models(count, **sizes)
    if method == "karcher":  # what is nearly parallel needs no steps
        models = [model - base for model in models]
    fisher = []
    if METHODS[method].needs_fisher:
        generator = torch.Generator().manual_seed(3)
        fisher = [(k + 1) * torch.rand(base.shape, generator=generator) ** 4 for k in range(count)]
    parameters = {}
    if any(p.name == "weight" for p in METHODS[method].parameters):
        parameters["weight"] = [0.5, 1.5, 0.7, 1.1][:count]
    if method in T:
        parameters["t"] = T[method]
    if method == "regmean":
        parameters["gram"] = grams_of(count, base.shape[-1] if base.shape else 1)
    return models, base if method in NEED_BASE else None, fisher, parameters


# For each parameter, or that of one method: two values whose results differ, and what else must be set for that.
CHANGES = {
    "weight": (None, None, {}),
    "normalize": (True, False, {}),
    "lambda": (1.0, 0.5, {}),
    "density": (0.8, 0.4, {}),
    "rescale": (True, False, {"density": 0.5}),
    "gamma": (0.01, 0.2, {"density": 0.4}),
    "epsilon": (0.05, 0.3, {"density": 0.5}),
    "t": (0.02, 0.5, {}),
    "nuslerp_flatten": (True, False, {}),
    "nuslerp_row_wise": (True, False, {"nuslerp_flatten": False}),
    "normalize_weights": (True, False, {}),
    "eps": (1e-8, 10.0, {}),
    "max_iter": (0, 10, {}),
    "tol": (1e-5, 3.0, {}),
    "filter_wise": (True, False, {}),
    "select_topk": (1.0, 0.3, {}),
    "scale": (1.0, 0.5, {}),
    "fisher_normalize": ("tensor", "none", {}),
    "fisher_floor": (0.0, 0.5, {}),
    "alpha": (0.9, 0.2, {}),
    "r": (0.1, 1.0, {"epsilon": 0.1}),
    ("ram", "epsilon"): (1e-5, 0.1, {}),
    ("ramplus_tl", "epsilon"): (1e-5, 0.1, {}),
    ("ramplus_tl", "alpha"): (0.1, 0.9, {"epsilon": 0.1}),
    "gram": (None, None, {}),
}


@pytest.mark.parametrize(
    ("method", "name"), [(method.name, p.name) for method in METHODS.values() for p in method.parameters]
)
def test_every_parameter_counts(merge, random_models, method, name) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models)
    first, second, others = CHANGES.get((method, name)) or CHANGES[name]
    if name == "weight":
        first, second = parameters["weight"], [1.5, 0.5, 1.9][: len(models)]
    if name == "gram":
        first, second = parameters["gram"], grams_of(len(models), seed=1)
    parameters |= others
    one, two = (merge(method, models, base, fisher, **parameters | {name: v}) for v in (first, second))
    assert (one - two).abs().max() > 1e-4
    if next(p for p in METHODS[method].parameters if p.name == name).per_model and method not in ONE_MODEL:
        for k in range(len(models)):  # each model's own value counts
            values = list(first) if isinstance(first, list) else [first] * len(models)
            values[k] = second[k] if isinstance(second, list) else second
            changed = merge(method, models, base, fisher, **parameters | {name: values})
            assert (one - changed).abs().max() > 1e-5, k


@pytest.mark.parametrize("method", METHODS)
def test_the_function_takes_what_is_registered(method) -> None:
    names = {p.name + ("_" if p.name == "lambda" else "") for p in METHODS[method].parameters}
    assert set(inspect.signature(METHODS[method].function).parameters) == {"group", *names}
    assert METHODS[method].summary.endswith(".")
    assert METHODS[method].paper


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ONE_MODEL])
def test_no_model_is_left_out(merge, random_models, method) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models)
    merged = merge(method, models, base, fisher, **parameters)
    for k in range(len(models)):
        changed = [model + 0.2 * torch.sign(model) if j == k else model for j, model in enumerate(models)]
        assert (merge(method, changed, base, fisher, **parameters) - merged).abs().max() > 1e-3, k


@pytest.mark.parametrize("method", [name for name in METHODS if name not in [*ONE_MODEL, *SPECTRAL]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_stay_what_they_are(merge, random_models, method, dtype) -> None:
    """Where weights are shares of one; at full density, DELLA's rows too."""
    models, base, fisher, parameters = inputs_of(method, random_models, dtype=dtype)
    count = len(models)
    models = models[:1] * count
    if "weight" in parameters:
        parameters["weight"] = [1 / count] * count
    merged = merge(method, models, base, fisher, **parameters)
    assert torch.equal(merged.float().to(dtype), models[0])


# model_stock and nuslerp take two models; iso_c gives even one delta another spectrum.
@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in [*ONE_MODEL, "model_stock", "nuslerp", "iso_c"]]
)
def test_one_model_alone_is_the_result(merge, random_models, method) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models)
    models, fisher = models[:1], fisher[:1]
    parameters = {name: value[:1] for name, value in parameters.items()}
    if "weight" in parameters:
        parameters["weight"] = [1.0]
    merged = merge(method, models, base, fisher, **parameters)
    torch.testing.assert_close(merged, models[0].double(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "method",
    ["linear", "task_arithmetic", "dare_linear", "della_linear", "breadcrumbs", "fisher", "fisher_simple"],
)
def test_two_models_at_one_half_are_the_midpoint(merge, random_models, method) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models, 2)
    if method == "fisher_simple":
        models[1] = models[0].flip(0)  # of the same norm
    parameters["weight"] = [0.5, 0.5]
    merged = merge(method, models, base, fisher[:1] * 2, **parameters)
    midpoint = (models[0].double() + models[1].double()) / 2
    torch.testing.assert_close(merged, midpoint, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in [*ONE_MODEL, "nuslerp", *RANDOM]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_order_of_models_changes_no_bit(merge, random_models, method, dtype) -> None:
    """Float64 sums differ by their own rounding, which float32 and then bfloat16 absorb.

    (Rounded to float32 alone, two sums of weights such as 0.7 / 3.8 that stand for an exact midpoint can fall apart.)
    """
    models, base, fisher, parameters = inputs_of(method, random_models, 4, dtype=dtype)
    others = {"density": 0.5} if any(p.name == "density" for p in METHODS[method].parameters) else {}
    merged = merge(method, models, base, fisher, **parameters, **others)
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        shuffled = {name: [values[k] for k in order] for name, values in parameters.items()}
        reordered, fisher_too = [models[k] for k in order], [fisher[k] for k in order] if fisher else []
        again = merge(method, reordered, base, fisher_too, **shuffled, **others)
        if dtype == torch.float64:
            torch.testing.assert_close(merged, again, rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(merged.float().to(dtype), again.float().to(dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape", [(0,), (3, 0), (0, 4), (), (1,), (1, 1), (5, 1), (1, 7), (2, 3, 4), (2, 3, 2, 2)]
)
def test_every_shape(merge, random_models, method, shape) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models, shape=shape)
    for others in (
        {},
        {"density": 0.5},
        {"filter_wise": True},
        {"select_topk": 0.5},
        {"nuslerp_flatten": False},
    ):
        if not takes(method, others):
            continue
        merged = merge(method, models, base, fisher, **parameters, **others)
        assert merged.shape == shape
        assert merged.isfinite().all()


@pytest.mark.parametrize(
    ("method", "others"),
    [
        (method, others)
        for method in [*NEED_BASE, "nuslerp", "multislerp", "fisher_simple"]
        for others in ({}, {"density": 0.3}, {"filter_wise": True}, {"select_topk": 0.5})
        if takes(method, others)
    ],
)
def test_models_that_are_the_base_give_the_base(merge, random_models, method, others) -> None:
    _, base = random_models()
    models, _, fisher, parameters = inputs_of(method, random_models)
    merged = merge(method, [base] * len(models), base, fisher, **parameters, **others)
    assert torch.equal(merged.float(), base)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_give_zeros(merge, random_models, method) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models)
    zeros = [torch.zeros_like(model) for model in models]
    merged = merge(method, zeros, None if base is None else zeros[0], fisher, **parameters)
    assert not merged.any()


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS.values() if any(p.name == "weight" for p in m.parameters)]
)
def test_weights_that_are_all_zero(merge, random_models, method) -> None:
    """A mean of nothing is refused; a sum of nothing is the base."""
    models, base, fisher, parameters = inputs_of(method, random_models)
    parameters["weight"] = [0.0] * len(models)
    if base is not None:
        assert torch.equal(merge(method, models, base, fisher, **parameters).float(), base)
    elif method == "nuslerp":
        halves = parameters | {"weight": [0.5, 0.5]}
        assert torch.equal(merge(method, models, **parameters), merge(method, models, **halves))
    else:
        with pytest.raises(ConfigError, match=r"layer\.weight: the weights 0, 0.* add up to 0"):
            merge(method, models, base, fisher, **parameters)


def test_weights_that_cancel_but_for_rounding_are_refused(merge, random_models) -> None:
    models, _ = random_models()
    with pytest.raises(ConfigError, match="add up to 0"):
        merge("linear", models, weight=[0.1, 0.2, -0.3])
    assert merge("linear", models, weight=[0.1, 0.2, -0.3], normalize=False).isfinite().all()


@pytest.mark.parametrize("method", ["fisher", "fisher_simple", "from_optimizer", "regmean"])
def test_negative_importance_is_refused(merge, random_models, method) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models)
    with pytest.raises(ConfigError, match="negative"):
        merge(method, models, base, fisher, **parameters | {"weight": [1.0, -0.5, 1.0]})


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("ties", {"density": 50}, "density 50 does not lie between 0 and 1"),
        ("dare_ties", {"density": -0.1}, "density -0.1"),
        ("breadcrumbs", {"gamma": 2.0, "density": 0.5}, "gamma 2"),
        ("della", {"density": 0.1, "epsilon": 0.2}, "probabilities from -0.1 to 0.3"),
        ("della", {"density": 0.9, "epsilon": 0.2}, "probabilities from 0.7 to 1.1"),
        ("sce", {"select_topk": 1.5}, "select_topk 1.5"),
        ("fisher", {"fisher_normalize": "global"}, "there are model, tensor, none"),
        ("fisher", {"fisher_floor": -1.0}, "fisher_floor"),
        ("regmean", {"alpha": 1.2}, "alpha"),
    ],
)
def test_parameters_out_of_range_are_refused(merge, random_models, method, wrong, message) -> None:
    models, base, fisher, parameters = inputs_of(method, random_models)
    with pytest.raises(ConfigError, match=message):
        merge(method, models, base, fisher, **parameters | wrong)


def test_required_parameters_are_those_of_mergekit() -> None:
    required = {m.name: [p.name for p in m.parameters if p.default is REQUIRED] for m in METHODS.values()}
    needs = {name: names for name, names in required.items() if names}
    assert needs.pop("slerp") == needs.pop("nearswap") == ["t"]
    assert needs.pop("regmean") == ["gram"]
    assert set(needs) == {
        *("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear"),
        *("breadcrumbs", "breadcrumbs_ties", "nuslerp", "multislerp"),
    }
    assert all(names == ["weight"] for names in needs.values())


class TestOppositeModels:
    def test_slerp_goes_through_the_origin(self, merge, random_models) -> None:
        (model,), _ = random_models(1)
        torch.testing.assert_close(merge("slerp", [-model], model, t=0.25), 0.5 * model.double())

    def test_nuslerp_goes_through_the_origin(self, merge, random_models) -> None:
        (model,), _ = random_models(1)
        merged = merge("nuslerp", [model, -model], weight=[3.0, 1.0])
        torch.testing.assert_close(merged, 0.5 * model.double())

    def test_multislerp_is_the_weighted_sum(self, merge, random_models) -> None:
        (model,), _ = random_models(1)
        for models in ([model, -model], [model, -model, 0 * model], [model, model, -2 * model, -2 * model]):
            merged = merge("multislerp", models, weight=1.0)
            torch.testing.assert_close(merged, sum(m.double() for m in models) / len(models))

    def test_karcher_takes_one_of_them(self, merge, random_models) -> None:
        (model,), _ = random_models(1)
        torch.testing.assert_close(merge("karcher", [model, -model]), model.double())

    def test_model_stock_trusts_no_mean(self, merge, random_models) -> None:
        (model,), base = random_models(1)
        for filter_wise in (False, True):
            merged = merge("model_stock", [model, 2 * base - model], base, filter_wise=filter_wise)
            assert torch.equal(merged.float(), base)


def test_karcher_leaves_tensors_of_zeros_without_direction(merge, random_models) -> None:
    models, _ = random_models(2)
    both = merge("karcher", models)
    with_zeros = merge("karcher", [*models, torch.zeros_like(models[0])])
    torch.testing.assert_close(with_zeros, both * 2 / 3)


def test_sce_and_model_stock_know_no_scale(merge, random_models) -> None:
    """Deltas of 1e-6 are merged as those of 1 are."""
    models, base = random_models(dtype=torch.float64)
    models[1] = base + 3 * (models[1] - base)
    models[2] = models[2] + 0.5 * (models[1] - base)
    small = [base + 1e-6 * (model - base) for model in models]
    for method, parameters in (("sce", {}), ("sce", {"select_topk": 0.3}), ("model_stock", {})):
        delta = merge(method, models, base, **parameters) - base
        tiny = merge(method, small, base, **parameters) - base
        torch.testing.assert_close(tiny * 1e6, delta, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", RANDOM)
class TestRandomMethods:
    @pytest.fixture
    def run(self, merge, random_models, method):
        models, base = random_models(2, (50, 60))

        def go(**changes):
            parameters = {"seed": 5, "name": "layers.3.weight", "weight": [1.0, 1.0], "density": 0.5}
            return merge(method, models, base, **parameters | changes)

        return go

    def test_the_same_again(self, run) -> None:
        assert torch.equal(run(), run())

    def test_another_seed_or_name_is_another_mask(self, run) -> None:
        assert not torch.equal(run(), run(seed=6))
        assert not torch.equal(run(), run(name="layers.4.weight"))

    def test_pieces_and_blocks_change_nothing(self, run, monkeypatch) -> None:
        whole = run()
        monkeypatch.setattr("toolkit.merging.methods.rows.BLOCK_ELEMENTS", 130)
        assert torch.equal(run(piece_size=1024), whole)

    def test_models_have_masks_of_their_own(self, merge, method) -> None:
        base, model = torch.zeros(100, 100), torch.ones(100, 100)
        alone = merge(method, [model], base, weight=[1.0], density=0.5)
        both = merge(method, [base, model], base, weight=[1.0, 1.0], density=0.5, normalize=False)
        assert not torch.equal(alone != 0, both != 0)
        assert 0.2 < ((alone != 0) & (both != 0)).double().mean() < 0.3


def test_blocks_of_rows_change_nothing(merge, random_models, monkeypatch) -> None:
    cases = [
        ("sce", {"select_topk": 0.3}),
        ("model_stock", {"filter_wise": True}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ]
    inputs = [inputs_of(method, random_models) for method, _ in cases]
    whole = [merge(m, *i[:3], **i[3], **p) for (m, p), i in zip(cases, inputs, strict=True)]
    monkeypatch.setattr("toolkit.merging.methods.rows.BLOCK_ELEMENTS", 90)
    for (method, parameters), given, expected in zip(cases, inputs, whole, strict=True):
        merged = merge(method, *given[:3], **given[3], **parameters)
        torch.testing.assert_close(merged, expected, rtol=2e-7, atol=1e-12)
