"""Merging participants in one process: what comes out, what is said, what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parent))

from merging_cases import (
    PARTICIPANTS,
    algorithm,
    fisher_of,
    fresh_adapter,
    full_state,
    lora_state,
    options,
    tied_state,
)

from toolkit.errors import InputError, MergeError, ModelError
from toolkit.merging.memory import merge_state_dicts
from toolkit.rounds.merging import Contribution, MergeCoordinator
from toolkit.rounds.merging.integrity import sha256_of


def contribution(number, state, weight, fisher=None):
    return Contribution(participant=PARTICIPANTS[number], state=state, weight=weight, fisher=fisher)


def merge(states, weights, *, fishers=None, label="round 1", config=None, **coordinator):
    merging = MergeCoordinator(config or options(), **coordinator)
    fishers = fishers or [None] * len(states)
    contributions = [
        contribution(number, *entry)
        for number, entry in enumerate(zip(states, weights, fishers, strict=True))
    ]
    return merging.merge(contributions, label=label)


def differing(first, second):
    assert list(first) == list(second)
    return [name for name in first if not torch.equal(first[name], second[name])]


def copies(state):
    return {name: tensor.clone() for name, tensor in state.items()}


# --- results


def test_two_with_equal_weights_are_the_exact_midpoint():
    a, b = full_state(1), full_state(2)
    merged = merge([a, b], [0.5, 0.5]).state
    for name in a:
        middle = a[name] if name == "positions" else ((a[name].double() + b[name].double()) / 2).float()
        assert torch.equal(merged[name], middle), name


def test_every_participant_counts_with_its_weight():
    states, weights = [full_state(k) for k in range(3)], [0.5, 0.3, 0.2]
    merged = merge(states, weights).state
    for name in states[0]:
        if states[0][name].is_floating_point():
            mean = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
            assert (merged[name].double() - mean).abs().max() <= 2**-24 * mean.abs().max(), name


@pytest.mark.parametrize("name", ["linear", "ties", "slerp", "fisher_dataset"])
def test_one_alone_is_the_identity(name):
    state = full_state(1)
    outcome = merge([state], [1.0], config=options(**algorithm(name)), base=full_state(5))
    assert differing(outcome.state, state) == []
    assert all(outcome.state[key] is not state[key] for key in state)
    assert "one participant alone" in " ".join(outcome.notes)


def test_one_adapter_alone_is_the_identity():
    state = lora_state(1)
    assert differing(merge([state], [1.0], adapter_config=LoraConfig(r=4)).state, state) == []


def test_weight_zero_leaves_a_participant_out():
    states = [full_state(k) for k in range(3)]
    states[1]["layer.0.weight"].fill_(float("nan"))  # not even looked at
    outcome = merge(states, [0.25, 0.0, 0.75])
    assert differing(outcome.state, merge([states[0], states[2]], [0.25, 0.75]).state) == []
    assert outcome.notes == ["left out, with weight 0: fr-FR"]
    assert outcome.weights == {"en-US": 0.25, "fr-FR": 0.0, "de-DE": 0.75}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ties", {"density": 0.2}),
        ("dare_linear", {"density": 0.5}),
        ("task_arithmetic", {"lambda": 0.5}),
        ("model_stock", {}),
        ("sce", {"select_topk": 0.3}),
        ("tsv_m", {}),
    ],
)
def test_methods_on_deltas_take_the_base(name, parameters):
    states, base = [full_state(k) for k in range(3)], full_state(9)
    merged = merge(states, [0.5, 0.3, 0.2], config=options(**algorithm(name, **parameters)), base=base).state
    assert set(differing(merged, base)) >= {"embeddings.weight", "layer.0.weight", "layer.1.weight"}
    # Moving the base and all states by the same amount moves the result by it.
    moved = [{n: t + 4.0 if t.is_floating_point() else t for n, t in s.items()} for s in [*states, base]]
    other = merge(
        moved[:-1], [0.5, 0.3, 0.2], config=options(**algorithm(name, **parameters)), base=moved[-1]
    ).state
    assert (other["layer.0.weight"] - 4.0 - merged["layer.0.weight"]).abs().max() < 1e-4


def test_slerp_goes_from_the_first_to_the_second_by_its_weight():
    a, b = full_state(1), full_state(2)
    merged = merge([a, b], [0.75, 0.25], config=options(**algorithm("slerp"))).state
    expected = merge_state_dicts([b], "slerp", base=a, t=0.25)
    assert differing(merged, expected) == []


@pytest.mark.parametrize("name", ["fisher_dataset", "from_optimizer"])
def test_fisher_weighs_each_element(name):
    states = [full_state(k) for k in range(2)]
    fishers = [fisher_of(state, number) for number, state in enumerate(states)]
    parameters = {"fisher_normalize": "none", "fisher_floor": 0.0}
    merged = merge(states, [0.5, 0.5], fishers=fishers, config=options(**algorithm(name, **parameters))).state
    weight = "layer.0.weight"
    (a, b), (f, g) = ([entry[weight].double() for entry in entries] for entries in (states, fishers))
    expected = (f * a + g * b) / (f + g)
    assert (merged[weight].double() - expected).abs().max() < 1e-6
    assert (merged[weight].double() - (a + b) / 2).abs().max() > 0.1


def test_masks_differ_from_merge_to_merge_and_come_back():
    states, base = [full_state(k) for k in range(2)], full_state(9)
    config = options(**algorithm("dare_linear", density=0.5))
    first, again, other = (
        merge(states, [0.5, 0.5], config=config, base=base, label=label, seed=7).state
        for label in ("round 1", "round 1", "round 2")
    )
    assert differing(first, again) == []
    assert differing(first, other) != []


@pytest.mark.parametrize(("name", "parameters"), [("fisher_dataset", {}), ("dare_linear", {"density": 0.5})])
def test_tied_tensors_stay_tied(name, parameters):
    states, base = [tied_state(k) for k in range(3)], tied_state(9)
    fishers = [fisher_of(state, number) for number, state in enumerate(states)]
    merged = merge(
        states, [0.5, 0.3, 0.2], fishers=fishers, config=options(**algorithm(name, **parameters)), base=base
    ).state
    assert torch.equal(merged["head.weight"], merged["embeddings.weight"])
    assert merged["head.weight"].data_ptr() != merged["embeddings.weight"].data_ptr()
    plain = [{n: t for n, t in s.items() if n != "head.weight"} for s in states]
    alone = merge(
        plain,
        [0.5, 0.3, 0.2],
        fishers=fishers,
        config=options(**algorithm(name, **parameters)),
        base={n: t for n, t in base.items() if n != "head.weight"},
    ).state
    assert torch.equal(alone["embeddings.weight"], merged["embeddings.weight"])


# --- adapters


def products(state):
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {
        name: state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()
        for name in names
    }


def test_adapters_are_merged_by_their_products():
    states, weights = [lora_state(k, apart=0.3) for k in range(3)], [0.5, 0.3, 0.2]
    outcome = merge(states, weights, adapter_config=LoraConfig(r=4))
    errors, norms = [], []
    for name, product in products(outcome.state).items():
        exact = sum(w * products(s)[name] for w, s in zip(weights, states, strict=True))
        left_out = np.linalg.svd(exact.numpy(), compute_uv=False)[4:]
        error = float(torch.linalg.norm(product - exact))
        assert error == pytest.approx(float(np.linalg.norm(left_out)), rel=1e-6)
        errors.append(error)
        norms.append(float(torch.linalg.norm(exact)))
    measured = np.linalg.norm(errors) / np.linalg.norm(norms)
    assert outcome.integrity["products"]["relative_error"] == pytest.approx(measured, rel=1e-6)
    factors = merge(states, weights, adapter_config=LoraConfig(r=4), config=options(lora_merge="factors"))
    assert factors.integrity["products"]["relative_error"] > 1.2 * measured
    head = "base_model.model.classifier.weight"
    assert torch.equal(outcome.state[head], factors.state[head])
    assert outcome.method == "linear (products)"
    assert factors.method == "linear (factors)"


def test_factors_are_averaged_where_that_was_asked_for():
    states = [lora_state(k) for k in range(2)]
    merged = merge(
        states, [0.5, 0.5], adapter_config=LoraConfig(r=4), config=options(lora_merge="factors")
    ).state
    for name in merged:
        assert torch.equal(merged[name], ((states[0][name].double() + states[1][name].double()) / 2).float())


def test_elementwise_methods_merge_factors():
    states, base = [lora_state(k) for k in range(3)], fresh_adapter()
    config = options(**algorithm("ties", density=0.5))
    outcome = merge(states, [0.4, 0.3, 0.3], adapter_config=LoraConfig(r=4), config=config, base=base)
    expected = merge_state_dicts(
        states, "ties", base=base, weight=[0.4, 0.3, 0.3], density=0.5, keep_order=True
    )
    assert differing(outcome.state, expected) == []
    assert outcome.integrity["products"]["relative_error"] > 0
    assert outcome.method == "ties (factors)"


# --- what is recorded and checked


def test_the_outcome_says_what_went_in_and_what_came_out():
    states = [full_state(k) for k in range(2)]
    outcome = merge(states, [0.5, 0.5])
    assert outcome.input_sha256 == {"en-US": sha256_of(states[0]), "fr-FR": sha256_of(states[1])}
    assert outcome.output_sha256 == sha256_of(outcome.state)
    assert outcome.integrity == {
        "inputs_unchanged": True,
        "names_shapes_dtypes": True,
        "finite": True,
        "weights_add_up_to_1": True,
        "inside_envelope": True,
    }
    assert (outcome.method, outcome.attempts, outcome.notes) == ("linear", 1, [])
    assert outcome.seconds > 0


def test_without_validation_nothing_is_hashed_and_weights_are_divided_by_their_sum():
    states = [full_state(k) for k in range(2)]
    outcome = merge(states, [2.0, 2.0], config=options(validate_merge_integrity=False))
    assert (outcome.input_sha256, outcome.output_sha256, outcome.integrity) == ({}, "", {})
    assert differing(outcome.state, merge(states, [0.5, 0.5]).state) == []


def test_inputs_are_as_they_were():
    states = [full_state(k) for k in range(3)]
    before = [copies(state) for state in states]
    merge(states, [0.5, 0.3, 0.2])
    assert [differing(*pair) for pair in zip(states, before, strict=True)] == [[], [], []]


# --- mixtures


def test_each_gets_its_own_mixture():
    states = [full_state(k) for k in range(3)]
    names = PARTICIPANTS[:3]
    weights = {
        names[0]: {names[0]: 0.7, names[2]: 0.3},
        names[1]: {names[1]: 1.0},
        names[2]: dict.fromkeys(names, 1 / 3),
    }
    contributions = [contribution(number, state, 0.0) for number, state in enumerate(states)]
    outcomes = dict(MergeCoordinator(options()).merge_each(contributions, weights, label="round 1"))
    assert list(outcomes) == list(names)
    assert differing(outcomes[names[0]].state, merge([states[0], states[2]], [0.7, 0.3]).state) == []
    assert differing(outcomes[names[1]].state, states[1]) == []
    assert differing(outcomes[names[2]].state, merge(states, [1 / 3] * 3).state) == []
    hashes = {name: sha256_of(state) for name, state in zip(names, states, strict=True)}
    assert all(outcome.input_sha256 == hashes for outcome in outcomes.values())
    assert [outcome.weights for outcome in outcomes.values()] == list(weights.values())


@pytest.mark.parametrize("name", ["layer.0.bias", "temperature", "embeddings.weight"])
def test_a_state_that_changes_between_mixtures_is_seen(name):
    states = [full_state(k) for k in range(2)]
    weights = {target: dict.fromkeys(PARTICIPANTS[:2], 0.5) for target in PARTICIPANTS[:2]}
    contributions = [contribution(number, state, 0.0) for number, state in enumerate(states)]
    mixtures = MergeCoordinator(options()).merge_each(contributions, weights, label="round 1")
    next(mixtures)
    states[1][name].view(-1)[-1] += 1
    with pytest.raises(MergeError, match="the state of fr-FR changed while it was merged"):
        next(mixtures)


# --- what is refused


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"weights": [0.5, 0.4]}, MergeError, r"merge round 1: the weights add up to 0.9, not to 1"),
        ({"weights": [0.0, 0.0]}, InputError, "all weights are 0"),
        ({"weights": [1.5, -0.5]}, InputError, "the weight of fr-FR is -0.5"),
        ({"weights": [float("nan"), 1.0]}, InputError, "the weight of en-US is nan"),
    ],
)
def test_weights_that_are_wrong(given, kind, message):
    with pytest.raises(kind, match=message):
        merge([full_state(1), full_state(2)], **given)


def spoilt(name, value):
    state = full_state(2)
    state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        (
            spoilt("layer.0.bias", torch.full((48,), torch.nan)),
            MergeError,
            "layer.0.bias: state of fr-FR holds NaN",
        ),
        (
            spoilt("norm.weight", torch.ones(3)),
            ModelError,
            r"norm.weight: torch.float32 \(3,\) in the state of fr-FR",
        ),
        (spoilt("norm.weight", torch.ones(24).half()), ModelError, "torch.float16"),
        (spoilt("another", torch.ones(3)), ModelError, "has another too"),
        (spoilt("positions", torch.zeros(9, dtype=torch.long)), ModelError, "positions"),
    ],
)
def test_states_that_do_not_fit(state, kind, message):
    with pytest.raises(kind, match=message):
        merge([full_state(1), state], [0.5, 0.5])


def test_factors_that_are_not_finite():
    states = [lora_state(k) for k in range(2)]
    name = next(name for name in states[1] if "lora_B" in name)
    states[1][name][0, 0] = torch.inf
    with pytest.raises(MergeError, match=r"lora_B\.weight: state of fr-FR holds NaN or infinity"):
        merge(states, [0.5, 0.5], adapter_config=LoraConfig(r=4))


def test_a_sum_that_overflows_its_type():
    states = [{"a": torch.full((3,), 60000.0, dtype=torch.float16)} for _ in range(2)]
    base = {"a": torch.full((3,), -60000.0, dtype=torch.float16)}
    with pytest.raises(MergeError, match="a: 3 values of the result are NaN or infinite"):
        merge(
            states, [0.5, 0.5], config=options(**algorithm("task_arithmetic", **{"lambda": 2.0})), base=base
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (algorithm("liner"), "did you mean 'linear'"),
        (algorithm("ties"), "ties needs the state that the participants started from"),
        (algorithm("arcee_fusion"), "changes one model and does not merge several"),
        (algorithm("passthrough"), "changes one model and does not merge several"),
        (algorithm("regmean"), "regmean needs the parameter gram"),
        (algorithm("linear", weight=0.5), "weights come from the weight calculation"),
        (algorithm("karcher", densty=0.5), "karcher has no parameter 'densty'"),
        (algorithm("fisher_dataset", fisher_normalize="modl"), "did you mean 'model'"),
        (algorithm("fisher_dataset", fisher_floor=-1.0), "fisher_floor: -1 is less than 0"),
    ],
)
def test_options_that_are_wrong(given, message):
    with pytest.raises(InputError, match=message):
        MergeCoordinator(options(**given))


def test_adapters_by_products_are_for_linear_alone():
    config = options(**algorithm("karcher"), lora_merge="svd")
    with pytest.raises(InputError, match="lora_merge svd is the mean of the products"):
        MergeCoordinator(config, adapter_config=LoraConfig(r=4))
    with pytest.raises(InputError, match="lora_merge is 'concat'"):
        MergeCoordinator(options(lora_merge="concat"), adapter_config=LoraConfig(r=4))


def test_too_many_for_the_method():
    with pytest.raises(InputError, match="slerp merges 2 participants, and there are 3"):
        merge([full_state(k) for k in range(3)], [0.4, 0.3, 0.3], config=options(**algorithm("slerp")))


def test_a_fisher_is_needed_and_must_fit():
    states = [full_state(k) for k in range(2)]
    config = options(**algorithm("fisher_dataset"))
    with pytest.raises(InputError, match="fisher weighs by a Fisher, which fr-FR did not bring"):
        merge(states, [0.5, 0.5], fishers=[fisher_of(states[0], 0), None], config=config)
    wrong = {"norm.weight": torch.ones(5)}
    with pytest.raises(ModelError, match=r"norm.weight: the Fisher of fr-FR has it with shape \(5,\)"):
        merge(states, [0.5, 0.5], fishers=[fisher_of(states[0], 0), wrong], config=config)


def test_nobody_to_merge():
    with pytest.raises(InputError, match="there is no state of any participant"):
        MergeCoordinator(options()).merge([], label="round 1")


def test_methods_without_weights_say_so():
    states, base = [full_state(k) for k in range(2)], full_state(9)
    outcome = merge(states, [0.9, 0.1], config=options(**algorithm("model_stock")), base=base)
    assert outcome.notes == ["model_stock takes no weights: they only say who takes part"]
