"""Layers are found by name, counted in config.json, cut and renumbered."""

import time

import pytest

from toolkit.merging.recipes.slices import LayerList, Layers, is_before_layers, split_name, with_layers


def names(prefix: str, count: int, *rests: str) -> list[str]:
    return [f"{prefix}.{layer}.{rest}" for layer in range(count) for rest in rests or ("w",)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up.weight", ("model.layers", 3, "mlp.up.weight")),
        ("h.0.attn.c_attn.bias", ("h", 0, "attn.c_attn.bias")),
        ("model.layers.2.mlp.experts.7.w1.weight", ("model.layers", 2, "mlp.experts.7.w1.weight")),
        ("0.weight", ("", 0, "weight")),
        ("model.norm.weight", None),
        ("classifier.1", None),
    ],
)
def test_names_are_split_at_the_first_number(name, expected):
    assert split_name(name) == expected


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("model.layers", "num_hidden_layers"),
        ("transformer.h", "n_layer"),
        ("encoder.layer", "num_hidden_layers"),
    ],
)
def test_the_main_list_is_that_of_the_configuration(prefix, key):
    layers = Layers([*names(prefix, 4), *names("classifier", 9), "norm.weight"], {key: 4})
    assert layers.main == LayerList(prefix, 4)
    assert [layers.depth(f"{prefix}.{i}.w") for i in range(4)] == [0, 1 / 3, 2 / 3, 1]
    assert layers.depth("norm.weight") == 0
    assert layers.depth("classifier.3.w") == 0  # a list, but not one that the configuration counts
    assert layers.in_main(f"{prefix}.2.w") == (2, "w")


def test_text_and_vision_have_depths_of_their_own():
    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 6}}
    layers = Layers([*names("visual.blocks", 6), *names("model.layers", 4)], config)
    assert layers.main == LayerList("model.layers", 4)
    assert layers.depth("visual.blocks.3.w") == 3 / 5


def test_without_a_count_the_longest_whole_list_is_the_main_one():
    layers = Layers([*names("model.layers", 5), *names("other", 3), "gap.7.w"], {})
    assert layers.main == LayerList("model.layers", 5)


def test_an_only_layer_has_depth_one():
    assert Layers(names("model.layers", 1), {"num_hidden_layers": 1}).depth("model.layers.0.w") == 1.0


def test_what_lies_before_the_layers():
    for name in ("model.embed_tokens.weight", "transformer.wte.weight", "embeddings.LayerNorm.bias"):
        assert is_before_layers(name), name
    for name in ("lm_head.weight", "model.norm.weight", "embed_out.weight", "score.weight"):
        assert not is_before_layers(name), name


def test_configurations_follow_their_layers():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "full", "sliding"],
        "mlp_only_layers": [0, 3],
        "eos_token_id": [1, 2, 3, 4],
    }
    other = {**config, "layer_types": ["a", "b", "c", "d"], "mlp_only_layers": [1]}
    new, notes = with_layers(config, 4, [(config, 0), (config, 1), (config, 3), (other, 1), (other, 2)])
    assert notes == []
    assert new["num_hidden_layers"] == 5
    assert new["layer_types"] == ["full", "sliding", "sliding", "b", "c"]
    assert new["mlp_only_layers"] == [0, 2, 3]
    assert new["eos_token_id"] == [1, 2, 3, 4]
    assert config["num_hidden_layers"] == 4


def test_the_count_of_a_part_is_set_there():
    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}
    new, _ = with_layers(config, 4, [(config, 0)])
    assert new == {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 4}}
    new, _ = with_layers(config, 4, [(config, 0)], "vision_tower")
    assert new["vision_config"] == {"num_hidden_layers": 1}


def test_a_configuration_without_count_is_noted():
    _, notes = with_layers({}, 4, [({}, 0)])
    assert "set it to 1 yourself" in notes[0]


def test_twenty_thousand_names_take_no_time():
    many = names("model.layers", 60, *(f"mlp.experts.{i}.w" for i in range(334)))
    began = time.process_time()
    layers = Layers(many, {"num_hidden_layers": 60})
    for name in many:
        layers.depth(name)
    assert layers.main == LayerList("model.layers", 60)
    assert time.process_time() - began < 2  # about 0.05 s; a quadratic search takes minutes
