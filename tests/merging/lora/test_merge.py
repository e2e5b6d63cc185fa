"""Merges of adapters alone, against float64 products of the factors."""

import json
import math

import numpy as np
import pytest
import torch

from toolkit.errors import ConfigError, ModelError
from toolkit.merging.lora import MODES, merge_adapter_states

OUT, IN = 24, 40
MODULES = ("model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.1.mlp.down_proj")


def make(seed, ranks, *, alpha=8, dtype=torch.float32, **options):
    """State and configuration of a random adapter with the given rank for each module."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, rank in ranks.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, IN, generator=generator).to(dtype)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(OUT, rank, generator=generator).to(
            dtype
        )
    rank = next(iter(ranks.values()))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "target_modules": sorted(ranks),
        "base_model_name_or_path": "base",
        **options,
    }
    return state, config


def scale_in_peft(config, name):
    """The scale that PEFT itself gives a module, by its own resolution of patterns."""
    from peft.utils.other import get_pattern_key

    rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], name), config["r"])
    alpha = config.get("alpha_pattern", {}).get(
        get_pattern_key(config.get("alpha_pattern", {}), name), config["lora_alpha"]
    )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def delta(state, config, name):
    """s B A in float64; zero where the adapter lacks the module."""
    if f"base_model.model.{name}.lora_A.weight" not in state:
        return np.zeros((OUT, IN))
    a, b = (state[f"base_model.model.{name}.lora_{x}.weight"].double().numpy() for x in "AB")
    rank, scale = scale_in_peft(config, name)
    assert a.shape == (rank, IN)
    return scale * b @ a


def exact(adapters, weights, name):
    return sum(w * delta(state, config, name) for w, (state, config) in zip(weights, adapters, strict=True))


def merged_of(adapters, weights, mode, **options):
    states, configs = zip(*adapters, strict=True)
    return merge_adapter_states(states, configs, weights, mode, **options)


MIXED = [
    make(1, {MODULES[0]: 4, MODULES[1]: 4, MODULES[2]: 6}, alpha=16),
    make(2, {MODULES[0]: 2, MODULES[1]: 5}, alpha=3, use_rslora=True),
    make(3, {MODULES[2]: 3}, alpha=1, alpha_pattern={".*down_proj": 9}),
]


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1.0, -2.0, 0.5], [3.0, 3.0, 3.0]])
@pytest.mark.parametrize("mode", ["concat", "svd"])
def test_the_product_is_the_exact_sum(mode, weights):
    merged = merged_of(MIXED, weights, mode, normalize=False, rank=12 if mode == "svd" else None)
    state, config = merged.state(), merged.config
    for name in MODULES:
        wanted = exact(MIXED, weights, name)
        got = delta(state, config, name)
        assert np.linalg.norm(got - wanted) <= 2e-7 * np.linalg.norm(wanted)
    assert merged.relative_error == 0 if mode == "concat" else merged.relative_error < 1e-14
    assert 1e-9 < merged.relative_rounding_error < 1e-7
    ranks = {error.name: error.rank for error in merged.errors}
    if mode == "concat":
        assert ranks == {MODULES[0]: 6, MODULES[1]: 9, MODULES[2]: 9}
    assert all(
        entry.norm == pytest.approx(np.linalg.norm(exact(MIXED, weights, entry.name)))
        for entry in merged.errors
    )


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_svd_is_the_nearest_product_of_that_rank_and_knows_its_error(rank):
    weights = [0.5, 0.3, 0.2]
    merged = merged_of(MIXED, weights, "svd", rank=rank)
    total = 0.0
    for entry, largest in zip(merged.errors, (4, 5, 6), strict=True):
        wanted = exact(MIXED, weights, entry.name)
        values = np.linalg.svd(wanted, compute_uv=False)
        kept = rank or largest
        assert entry.rank == kept
        lost = np.linalg.norm(delta(merged.state(), merged.config, entry.name) - wanted)
        assert lost == pytest.approx(np.linalg.norm(values[kept:]), rel=1e-6)
        assert entry.error == pytest.approx(lost, rel=1e-6)
        assert entry.relative_error == pytest.approx(lost / np.linalg.norm(wanted), rel=1e-6)
        total += lost**2
    norm = math.sqrt(sum(np.linalg.norm(exact(MIXED, weights, name)) ** 2 for name in MODULES))
    assert merged.relative_error == pytest.approx(math.sqrt(total) / norm, rel=1e-6)


@pytest.mark.parametrize("num_adapters", range(1, 9))
@pytest.mark.parametrize("normalize", [True, False])
def test_factors_is_the_mean_of_the_factors_and_measures_how_wrong_that_is(num_adapters, normalize):
    ranks = dict.fromkeys(MODULES, 4)
    adapters = [make(seed, ranks, alpha=4 + seed, use_rslora=seed % 2 == 0) for seed in range(num_adapters)]
    weights = [1.0 + 0.5 * k if k != 2 else -0.7 for k in range(num_adapters)]
    merged = merged_of(adapters, weights, "factors", normalize=normalize)
    if normalize:
        weights = [weight / sum(weights) for weight in weights]
    squares = norms = 0.0
    for entry in merged.errors:
        key = f"base_model.model.{entry.name}.lora_A.weight"
        mean = sum(w * state[key].double() for w, (state, _) in zip(weights, adapters, strict=True)) / sum(
            weights
        )
        torch.testing.assert_close(merged.state()[key], mean.float(), rtol=2**-23, atol=0)
        wanted = exact(adapters, weights, entry.name)
        lost = np.linalg.norm(delta(merged.state(), merged.config, entry.name) - wanted)
        assert entry.error == pytest.approx(lost, rel=1e-5, abs=1e-5)
        squares, norms = squares + lost**2, norms + np.linalg.norm(wanted) ** 2
    assert merged.relative_error == pytest.approx(math.sqrt(squares / norms), rel=1e-5, abs=1e-7)
    assert merged.relative_error > 0.5 if num_adapters > 1 else merged.relative_error == 0


def test_equal_adapters_merge_to_themselves_whatever_the_weights_add_up_to():
    adapter = make(1, dict.fromkeys(MODULES, 4))
    for mode in ("factors", "concat", "svd"):
        merged = merged_of([adapter] * 3, [1, 2, -0.5], mode, normalize=False)
        for name in MODULES:
            wanted = 2.5 * delta(*adapter, name)
            np.testing.assert_allclose(delta(merged.state(), merged.config, name), wanted, rtol=0, atol=2e-5)
        assert merged.relative_error < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_adapter_comes_out_of_factors_bit_for_bit(dtype):
    state, config = make(1, {MODULES[0]: 4, MODULES[1]: 7}, dtype=dtype, use_rslora=True, alpha=5)
    merged = merge_adapter_states([state], [config], [0.3], "factors")
    assert merged.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.state().items())
    assert all(tensor.dtype == dtype for tensor in merged.state().values())
    for name in MODULES[:2]:
        assert scale_in_peft(merged.config, name) == scale_in_peft(config, name)
    assert (merged.relative_error, merged.relative_rounding_error) == (0, 0)


def test_a_module_of_one_adapter_only_counts_as_zero_in_the_others():
    adapters = [make(1, {MODULES[0]: 4, MODULES[1]: 4}), make(2, {MODULES[0]: 4})]
    for mode in ("factors", "concat", "svd"):
        merged = merged_of(adapters, [1, 3], mode)
        got = delta(merged.state(), merged.config, MODULES[1])
        np.testing.assert_allclose(got, 0.25 * delta(*adapters[0], MODULES[1]), rtol=0, atol=1e-5)


def test_low_precision_factors_are_not_rounded_again_unless_asked():
    adapters = [make(seed, dict.fromkeys(MODULES, 4), dtype=torch.bfloat16) for seed in (1, 2)]
    merged = merged_of(adapters, [0.3, 0.7], "concat")
    assert {tensor.dtype for tensor in merged.state().values()} == {torch.float32}
    assert merged.relative_rounding_error < 1e-7
    merged = merged_of(adapters, [0.3, 0.7], "concat", dtype="bfloat16")
    assert {tensor.dtype for tensor in merged.state().values()} == {torch.bfloat16}
    lost = squares = 0.0
    for name in MODULES:
        wanted = exact(adapters, [0.3, 0.7], name)
        lost += np.linalg.norm(delta(merged.state(), merged.config, name) - wanted) ** 2
        squares += np.linalg.norm(wanted) ** 2
    assert merged.relative_rounding_error == pytest.approx(math.sqrt(lost / squares), rel=1e-6)


def test_numpy_and_a_shared_configuration_do_too():
    state, config = make(1, dict.fromkeys(MODULES, 4))
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    merged = merge_adapter_states([arrays, state], [config], None, "concat")
    assert np.allclose(
        delta(merged.state(), merged.config, MODULES[0]), delta(state, config, MODULES[0]), atol=1e-5
    )


def test_the_configuration_says_rank_and_scale_of_every_module():
    merged = merged_of(MIXED, [1, 1, 1], "concat")
    config = merged.config
    json.dumps(config)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (9, 9, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^model\.layers\.0\.q_proj": 6}
    assert config["target_modules"] == sorted(MODULES)
    assert config["inference_mode"] is True
    assert scale_in_peft(config, MODULES[1]) == (9, 1.0)


def test_the_remainder_completes_averaged_factors():
    adapters = [make(seed, dict.fromkeys(MODULES, 4)) for seed in (1, 2, 3)]
    weights = [0.5, 0.3, 0.2]
    merged = merged_of(adapters, weights, "residual")
    for name in MODULES:
        remainder = sum(
            weight
            * adapter.modules[name].scale
            * adapter.modules[name].b.float64()
            @ adapter.modules[name].a.float64()
            for adapter, weight in merged.remainder()
        )
        got = remainder + delta(merged.state(), merged.config, name)
        np.testing.assert_allclose(got, exact(adapters, weights, name), rtol=0, atol=1e-12)
        entry = next(entry for entry in merged.errors if entry.name == name)
        assert np.linalg.norm(remainder) == pytest.approx(entry.error, rel=1e-5)


def test_the_summary_names_the_error():
    adapters = [make(seed, dict.fromkeys(MODULES, 4)) for seed in (1, 2)]
    first, second, third = merged_of(adapters, None, "factors").summary()
    assert first == "factors: 2 adapters, 3 modules, rank 4"
    assert "% (is lost), rounding" in second
    assert third.startswith("largest error in model.layers.")
    exact = merged_of(adapters[:1], None, "concat").summary()
    assert exact[0] == "concat: 1 adapter, 3 modules, rank 4"
    assert exact[1].startswith("relative error 0 %, rounding ")  # nothing is lost
    opposite = merged_of([adapters[0], adapters[0]], [1, -1], "svd", normalize=False)
    assert opposite.relative_error is None or opposite.relative_error < 1
    assert "exact" in MODES["concat"]


# --- wrong input

ONE, OTHER = make(1, {MODULES[0]: 4}), make(2, {MODULES[0]: 5})


@pytest.mark.parametrize(
    ("weights", "mode", "options", "message"),
    [
        ([1, 1], "svdd", {}, "no mode 'svdd'; did you mean 'svd'"),
        ([1], "svd", {}, "1 weights for 2 adapters"),
        ([1, float("nan")], "svd", {}, "finite"),
        ([1, -1], "svd", {}, "add up to 0 and cannot be normalised"),
        ([1, 1], "concat", {"rank": 3}, "in the mode svd only"),
        ([1, 1], "svd", {"rank": 0}, "at least 1"),
        ([1, 1], "svd", {"dtype": "int8"}, "no dtype 'int8'"),
    ],
)
def test_wrong_options(weights, mode, options, message):
    with pytest.raises(ConfigError, match=message):
        merged_of([ONE, ONE], weights, mode, **options)


def test_nothing_to_merge():
    with pytest.raises(ConfigError, match="no adapter"):
        merge_adapter_states([], [])


def test_adapters_that_do_not_fit_together():
    with pytest.raises(ModelError, match=r"q_proj has the rank 4 in adapter 0, 5 in adapter 1"):
        merged_of([ONE, OTHER], None, "factors")
    with pytest.raises(ModelError, match="weights add up to 0, so its factors have no mean"):
        merged_of([ONE, ONE], [1, -1], "factors", normalize=False)
    state, config = make(2, {MODULES[0]: 4})
    state[f"base_model.model.{MODULES[0]}.lora_A.weight"] = torch.zeros(4, IN + 1)
    with pytest.raises(
        ModelError, match=r"q_proj has the shape \(24, 40\) in adapter 0, \(24, 41\) in adapter 1"
    ):
        merged_of([ONE, (state, config)], None, "concat")
    state, config = make(2, {MODULES[0]: 4})
    state[f"base_model.model.{MODULES[0]}.lora_A.weight"][0, 0] = math.inf
    with pytest.raises(ModelError, match=r"mine: base_model.*lora_A\.weight has 1 NaN or infinite"):
        merge_adapter_states([state], [config], names=["mine"])
    embedding = {
        "base_model.model.wte.lora_embedding_A": torch.zeros(4, IN),
        "base_model.model.wte.lora_embedding_B": torch.zeros(OUT, 4),
    }
    biased = {**ONE[0], f"base_model.model.{MODULES[0]}.lora_B.bias": torch.zeros(OUT)}
    with pytest.raises(ModelError, match="wte is an embedding"):
        merge_adapter_states([biased, embedding], [ONE[1]])
    for name, other in (
        ("score.weight", torch.zeros(3, IN)),
        ("score.weight", torch.zeros(2, IN, dtype=torch.int64)),
    ):
        first, second = (dict(ONE[0]) for _ in range(2))
        first[f"base_model.model.{name}"], second[f"base_model.model.{name}"] = torch.zeros(2, IN), other
        with pytest.raises(ModelError, match=r"score\.weight"):
            merge_adapter_states([first, second], [ONE[1]])


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "layers.1",
        "1.q_proj",
        r".*\.1\..*",
        "^model.layers.0",
        "model.layers.0.q_proj",
        "0.q_proj|10.q_proj",
    ],
)
def test_patterns_match_as_in_peft(pattern):
    from peft.utils.other import get_pattern_key

    ranks = {name: 3 if get_pattern_key([pattern, ".*down_proj"], name) == pattern else 4 for name in MODULES}
    ranks[MODULES[2]] = 6 if ranks[MODULES[2]] == 4 else 3
    state, config = make(1, ranks)
    config |= {"r": 4, "rank_pattern": {pattern: 3, ".*down_proj": 6}, "alpha_pattern": {pattern: 7}}
    merged = merge_adapter_states([state], [config], None, "factors")
    for name in MODULES:
        assert scale_in_peft(merged.config, name) == scale_in_peft(config, name)
        np.testing.assert_array_equal(delta(merged.state(), merged.config, name), delta(state, config, name))
