"""From recipe to plan: layers, slices, types, tied weights, tensors that some models lack, shapes."""

import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from toolkit.errors import ConfigError, ModelError
from toolkit.merging.recipes.recipe_file import read
from toolkit.merging.recipes.resolve import PlanOptions, plan_merge

LAYER = ("input_layernorm.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight")


def toy(
    num_layers: int = 4, vocabulary: int = 6, *, head: bool = False, dtype=np.float32, fill: float = 0.0
) -> dict:
    """The tensors of a small decoder; each layer's are filled with ``fill`` plus its number."""
    tensors = {"model.embed_tokens.weight": np.full((vocabulary, 2), fill, dtype)}
    for layer in range(num_layers):
        for rest in LAYER:
            tensors[f"model.layers.{layer}.{rest}"] = np.full((2,), fill + layer, dtype)
    tensors["model.norm.weight"] = np.full((2,), fill, dtype)
    if head:
        tensors["lm_head.weight"] = np.full((vocabulary, 2), fill + 0.5, dtype)
    return tensors


@pytest.fixture
def plan_of(write_recipe):
    def plan(text: str, **options):
        return plan_merge(read(write_recipe(text)), PlanOptions(**options))

    return plan


def linear(*folders, **top) -> str:
    models = "".join(f"  - {{model: {folder}, parameters: {{weight: 1}}}}\n" for folder in folders)
    return f"merge_method: linear\nmodels:\n{models}" + "".join(
        f"{name}: {value}\n" for name, value in top.items()
    )


def test_every_tensor_of_the_models_once(plan_of, make_model):
    a, b = (make_model(name, toy(), num_hidden_layers=4) for name in "ab")
    plan = plan_of(linear(a, b))
    assert sorted(tensor.name for tensor in plan.tensors) == sorted(toy())
    assert {len(tensor.models) for tensor in plan.tensors} == {2}
    assert plan.bytes_written == sum(array.nbytes for array in toy().values())
    assert [(model.role, model.label) for model in plan.inputs] == [("model", str(a)), ("model", str(b))]
    assert plan.notes == [f"{a} has no tokenizer: none is written"]


def test_gradients_and_filters_reach_their_layers(plan_of, make_model):
    a, b = (make_model(name, toy(), num_hidden_layers=4) for name in "ab")
    text = f"""
merge_method: slerp
base_model: {a}
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 4]}}
      - {{model: {b}, layer_range: [0, 4]}}
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0]}}
    - value: 0.5
"""
    t = {tensor.name: tensor.parameters["t"] for tensor in plan_of(text).tensors}
    # By hand: depths 0, 1/3, 2/3, 1 on five points at 0, 1/4, 1/2, 3/4, 1.
    expected = [0, 0.5 - 0.2 / 3, 0.3 + 0.4 * 2 / 3, 1]
    for layer in range(4):
        assert t[f"model.layers.{layer}.self_attn.q_proj.weight"] == pytest.approx(expected[layer], abs=1e-12)
        assert t[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx(1 - layer / 3, abs=1e-12)
        assert t[f"model.layers.{layer}.input_layernorm.weight"] == 0.5
    assert t["model.norm.weight"] == t["model.embed_tokens.weight"] == 0.5


def test_the_base_is_the_first_model_of_slerp_and_no_model_of_ties(plan_of, make_model):
    a, b, c = (
        make_model(name, toy(fill=fill), num_hidden_layers=4)
        for name, fill in (("a", 0), ("b", 10), ("c", 20))
    )
    slerp = f"merge_method: slerp\nbase_model: {b}\nparameters: {{t: 0.5}}\nmodels: [{{model: {a}}}, {{model: {b}}}]"
    for tensor in plan_of(slerp).tensors:
        assert [reader.where.split("/")[-2] for reader in tensor.models] == ["b", "a"]
        assert tensor.base is None
    for listed in (f"{{model: {a}}}, ", ""):
        ties = (
            f"merge_method: ties\nbase_model: {a}\nparameters: {{weight: 1}}\n"
            f"models: [{listed}{{model: {b}}}, {{model: {c}}}]"
        )
        for tensor in plan_of(ties).tensors:
            assert [reader.where.split("/")[-2] for reader in tensor.models] == ["b", "c"]
            assert tensor.base is not None
            assert tensor.base.where.split("/")[-2] == "a"


def test_the_base_of_a_method_without_one_is_merged_as_mergekit_does(plan_of, make_model):
    a, b, c = (make_model(name, toy(), num_hidden_layers=4) for name in "abc")
    text = f"merge_method: linear\nbase_model: {c}\nparameters: {{weight: 2}}\nmodels:\n"
    text += f"  - {{model: {a}, parameters: {{weight: 3}}}}\n  - {{model: {b}}}\n"
    plan = plan_of(text)
    for tensor in plan.tensors:
        assert [reader.where.split("/")[-2] for reader in tensor.models] == ["a", "b", "c"]
        assert tensor.parameters["weight"].tolist() == [3, 2, 2]
    assert [model.role for model in plan.inputs] == ["model"] * 3
    assert f"{c} is merged as the other models are: linear has no base" in plan.notes
    listed = plan_of(linear(a, b, c, base_model=c))
    assert {len(tensor.models) for tensor in listed.tensors} == {3}
    assert not any("is merged as" in note for note in listed.notes)


def test_a_base_that_is_merged_needs_what_the_models_need(plan_of, make_model):
    a, b = (make_model(name, toy(), num_hidden_layers=4) for name in "ab")
    with pytest.raises(
        ConfigError, match=rf"base_model {b} is merged too, as linear has no base, and has no 'w"
    ):
        plan_of(linear(a, base_model=b))
    with pytest.raises(ConfigError, match="passthrough takes 1 model, not 2 with base_model"):
        plan_of(f"merge_method: passthrough\nmodels: [{{model: {a}}}]\nbase_model: {b}")


def test_a_base_that_no_slice_is_cut_from_gives_configuration_only(plan_of, make_model):
    a, c = (make_model(name, toy(), num_hidden_layers=4) for name in "ac")
    plan = plan_of(
        f"merge_method: passthrough\nbase_model: {c}\nslices: [{{sources: [{{model: {a}, layer_range: [0, 2]}}]}}]"
    )
    assert {tensor.models[0].where.split("/")[-2] for tensor in plan.tensors} == {"a"}
    assert (plan.inputs[0].role, plan.inputs[0].files) == ("tokenizer", ())
    assert f"{c} gives configuration and tokenizer only: no slice is cut from it" in plan.notes


def test_the_base_of_a_slice_needs_no_parameters(plan_of, make_model):
    a, b = (make_model(name, toy(), num_hidden_layers=4) for name in "ab")
    text = f"""
merge_method: ties
slices:
  - base_model: {a}
    sources:
      - {{model: {a}, layer_range: [0, 4]}}
      - {{model: {b}, layer_range: [0, 4], parameters: {{weight: 1}}}}
"""
    for tensor in plan_of(text).tensors:
        assert tensor.base is not None
        assert tensor.base.where.split("/")[-2] == "a"
    wrong = text.replace("merge_method: ties", f"merge_method: ties\nbase_model: {b}").replace(
        ", parameters: {weight: 1}", ""
    )
    with pytest.raises(ConfigError, match=rf"needs the parameter 'weight' for {b}"):
        plan_of(wrong)


# --- slices


def test_slices_are_stacked_and_renumbered(plan_of, make_model, tmp_path):
    a = make_model("a", toy(fill=0, head=True), num_hidden_layers=4, layer_types=["f", "s", "f", "s"])
    b = make_model("b", toy(fill=100, head=True), num_hidden_layers=4, layer_types=["x", "y", "z", "w"])
    plan = plan_of(
        f"""
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 3]}}]
  - sources: [{{model: {b}, layer_range: [1, 3]}}]
"""
    )
    values = {tensor.name: float(tensor.models[0].span(0, 1).data[0]) for tensor in plan.tensors}
    assert [values[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(5)] == [0, 1, 2, 101, 102]
    assert "model.layers.5.mlp.up_proj.weight" not in values
    assert values["model.embed_tokens.weight"] == 0  # of the first slice's model
    assert (values["model.norm.weight"], values["lm_head.weight"]) == (100, 100.5)  # of the last slice's
    order = [tensor.name for tensor in plan.tensors]
    assert order[0] == "model.embed_tokens.weight"
    assert set(order[-2:]) == {"model.norm.weight", "lm_head.weight"}
    out = tmp_path / "out"
    out.mkdir()
    plan.write_companions(out)
    config = __import__("json").loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["f", "s", "f", "y", "z"]


def test_filters_of_a_slice_see_the_models_own_layer_numbers(plan_of, make_model):
    a = make_model("a", toy(), num_hidden_layers=4)
    plan = plan_of(
        f"""
merge_method: passthrough
slices:
  - sources: [{{model: {a}, layer_range: [0, 2]}}]
  - sources:
      - model: {a}
        layer_range: [1, 4]
        parameters: {{scale: [{{filter: layers.1.mlp, value: 0.5}}, {{value: 1}}]}}
"""
    )
    scale = {tensor.name: tensor.parameters["scale"][0] for tensor in plan.tensors}
    assert scale["model.layers.1.mlp.up_proj.weight"] == 1  # of the first slice
    assert scale["model.layers.2.mlp.up_proj.weight"] == 0.5  # was layer 1
    assert scale["model.layers.3.mlp.up_proj.weight"] == 1


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ("[{sources: [{model: A, layer_range: [0, 9]}]}]", r"layer_range \[0, 9\]: .*a has 4 layers"),
    ],
)
def test_layers_that_are_not_there(plan_of, make_model, ranges, words):
    a = make_model("a", toy(), num_hidden_layers=4)
    with pytest.raises(ModelError, match=words):
        plan_of(f"merge_method: passthrough\nslices: {ranges.replace('A', str(a))}")


def test_modules_take_their_tensors(plan_of, make_model):
    def both(fill: float) -> dict:
        vision = {f"vision_tower.blocks.{n}.w": np.full((2,), fill, np.float32) for n in range(2)}
        return vision | {
            name.replace("model.", "language_model.", 1): t for name, t in toy(fill=fill).items()
        }

    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 2}}
    a, b = make_model("a", both(0), **config), make_model("b", both(10), **config)
    text = f"""
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources: [{{model: {b}, layer_range: [2, 4], parameters: {{weight: 1}}}}]
  vision_tower:
    models:
      - {{model: {a}, parameters: {{weight: [1, 3]}}}}
      - {{model: {b}, parameters: {{weight: 1}}}}
"""
    tensors = {tensor.name: tensor for tensor in plan_of(text).tensors}
    assert [tensors[f"vision_tower.blocks.{n}.w"].parameters["weight"].tolist() for n in range(2)] == [
        [1, 1],
        [3, 1],
    ]
    assert tensors["language_model.layers.1.mlp.up_proj.weight"].models[0].span(0, 1).data[0] == 13
    assert "language_model.layers.2.mlp.up_proj.weight" not in tensors
    with pytest.raises(ModelError, match="no module of the recipe takes the tensor language_model"):
        plan_of(text.replace("text_decoder", "audio"))
    with pytest.raises(ModelError, match=r"no tensor belongs to 'audio'; parts are .*vision_tower"):
        plan_of(text.replace("vision_tower:", "audio:"))


# --- types


@pytest.mark.parametrize(
    ("first", "second", "top", "expected"),
    [
        ("bfloat16", "bfloat16", {}, "bfloat16"),
        ("bfloat16", "float16", {}, "float32"),
        ("float16", "float32", {}, "float32"),
        ("float32", "float64", {}, "float64"),
        ("float32", "float32", {"dtype": "bfloat16"}, "bfloat16"),
        ("float32", "float32", {"dtype": "float32", "out_dtype": "float16"}, "float16"),
    ],
)
def test_type_of_the_result(plan_of, make_model, tmp_path, first, second, top, expected):
    folders = []
    for name, dtype in (("a", first), ("b", second)):
        folder = make_model(name, {}, num_hidden_layers=4, torch_dtype=dtype)
        tensors = {name: torch.from_numpy(t).to(getattr(torch, dtype)) for name, t in toy().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    plan = plan_of(linear(*folders, **top))
    assert {tensor.dtype for tensor in plan.tensors} == {expected}
    out = tmp_path / "out"
    out.mkdir()
    plan.write_companions(out)
    assert f'"torch_dtype": "{expected}"' in (out / "config.json").read_text()


def test_whole_numbers_are_copied_where_they_are_equal(plan_of, make_model):
    positions = {"model.position_ids": np.arange(5)}
    a, b = make_model("a", toy() | positions), make_model("b", toy() | positions)
    tensor = next(t for t in plan_of(linear(a, b)).tensors if t.name == "model.position_ids")
    assert (tensor.method, tensor.dtype, len(tensor.models)) == (None, "int64", 1)
    c = make_model("c", toy() | {"model.position_ids": np.arange(5)[::-1].copy()})
    with pytest.raises(ModelError, match=r"model\.position_ids is int64 in .*a/model.*differs.*c/model"):
        plan_of(linear(a, c))


# --- tied weights


def test_tied_and_untied_models_merge_into_an_untied_one(plan_of, make_model, tmp_path):
    a = make_model("a", toy(fill=1), num_hidden_layers=4, tie_word_embeddings=True)
    b = make_model("b", toy(fill=5, head=True), num_hidden_layers=4, tie_word_embeddings=False)
    plan = plan_of(linear(a, b))
    head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert [float(reader.span(0, 1).data[0]) for reader in head.models] == [1, 5.5]
    out = tmp_path / "out"
    out.mkdir()
    plan.write_companions(out)
    assert '"tie_word_embeddings": false' in (out / "config.json").read_text()


def test_tied_models_stay_tied(plan_of, make_model, tmp_path):
    tied = toy(fill=1, head=True)
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    a = make_model("a", tied, num_hidden_layers=4, tie_word_embeddings=True)  # holds it twice
    b = make_model("b", toy(fill=5), num_hidden_layers=4, tie_word_embeddings=True)
    plan = plan_of(linear(a, b))
    assert "lm_head.weight" not in {tensor.name for tensor in plan.tensors}
    out = tmp_path / "out"
    out.mkdir()
    plan.write_companions(out)
    assert '"tie_word_embeddings": true' in (out / "config.json").read_text()


def test_a_head_with_other_values_is_not_tied_whatever_the_configuration_says(plan_of, make_model):
    a, b = (make_model(name, toy(head=True), num_hidden_layers=4, tie_word_embeddings=True) for name in "ab")
    assert "lm_head.weight" in {tensor.name for tensor in plan_of(linear(a, b)).tensors}


# --- what does not fit


def test_a_missing_tensor_names_tensor_and_folders(plan_of, make_model):
    extra = {"model.extra.weight": np.ones(2, np.float32)}
    a, b = make_model("a", toy() | extra), make_model("b", toy())
    with pytest.raises(ModelError) as caught:
        plan_of(linear(a, b))
    assert f"model.extra.weight is in {a}/model.safetensors and not in {b}" in str(caught.value)
    assert "--on-missing present" in str(caught.value)


def test_a_missing_tensor_can_be_merged_from_those_that_have_it(plan_of, make_model):
    extra = {"model.extra.weight": np.ones(2, np.float32)}
    a, b, c = make_model("a", toy() | extra), make_model("b", toy()), make_model("c", toy() | extra)
    plan = plan_of(linear(a, b, c), on_missing="present")
    tensor = next(t for t in plan.tensors if t.name == "model.extra.weight")
    assert len(tensor.models) == len(tensor.parameters["weight"]) == 2
    assert plan.notes[:1] == [f"model.extra.weight not in {b}: merged from the other models, or copied"]


def test_a_tensor_that_the_base_lacks_is_copied_from_an_only_model(plan_of, make_model):
    extra = {"model.extra.weight": np.full(2, 7, np.float32)}
    a, b = make_model("a", toy()), make_model("b", toy() | extra)
    text = f"merge_method: ties\nbase_model: {a}\nmodels: [{{model: {b}, parameters: {{weight: 1}}}}]\ndtype: bfloat16"
    plan = plan_of(text, on_missing="present")
    tensor = next(t for t in plan.tensors if t.name == "model.extra.weight")
    assert tensor.method is not None
    assert (tensor.method.name, tensor.dtype, tensor.base) == ("passthrough", "bfloat16", None)


def test_buffers_of_old_versions_are_left_out(plan_of, make_model):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    a, b = make_model("a", toy() | old), make_model("b", toy())
    plan = plan_of(linear(a, b))
    assert not any("inv_freq" in tensor.name for tensor in plan.tensors)
    assert "inv_freq left out" in plan.notes[0]


def test_a_vocabulary_of_another_size_says_what_helps(plan_of, make_model):
    a, b = make_model("a", toy(vocabulary=6)), make_model("b", toy(vocabulary=8))
    with pytest.raises(ModelError) as caught:
        plan_of(linear(a, b))
    message = str(caught.value)
    assert (
        f"model.embed_tokens.weight is [6, 2] in {a}/model.safetensors and [8, 2] in {b}/model.saf" in message
    )
    assert "the vocabularies differ" in message
    assert "tokenizer_source: union" in message
    assert "--unsafe-truncate-embeddings" in message


def test_truncated_vocabularies(plan_of, make_model, tmp_path):
    a, b = (make_model(name, toy(vocabulary=size), vocab_size=size) for name, size in (("a", 8), ("b", 6)))
    plan = plan_of(linear(a, b), truncate_embeddings=True)
    assert next(t for t in plan.tensors if "embed" in t.name).shape == (6, 2)
    out = tmp_path / "out"
    out.mkdir()
    plan.write_companions(out)
    assert '"vocab_size": 6' in (out / "config.json").read_text()


def test_all_shapes_that_differ_come_at_once(plan_of, make_model):
    other = {name: np.zeros((3, *t.shape[1:]), np.float32) for name, t in toy().items()}
    a, b = make_model("a", toy()), make_model("b", other)
    with pytest.raises(ModelError) as caught:
        plan_of(linear(a, b))
    assert str(caught.value).count(" in ") > 10
    assert "... and 4 more tensors" in str(caught.value)


def test_different_architectures_are_a_crime(plan_of, make_model):
    a, b = make_model("a", toy()), make_model("b", toy(), architectures=["OtherModel"])
    with pytest.raises(ModelError, match="different architectures") as caught:
        plan_of(linear(a, b))
    assert "--allow-crimes" in str(caught.value)
    assert "different architectures are mixed" in plan_of(linear(a, b), mix_architectures=True).notes[0]


def test_quantised_weights_are_refused(plan_of, make_model):
    a = make_model("a", toy(), quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"quantised \(gptq\)"):
        plan_of(linear(a))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("./nowhere", "there is no nowhere"),
        ("owner/model-that-is-not-there", "no such model"),
        ("{a}@main", "a folder has no revisions"),
        ("{a}/config.json", "is a file"),
        ("not a/hub id", "it is not a hub id"),
    ],
)
def test_models_that_are_not_there(plan_of, make_model, monkeypatch, tmp_path, reference, words):
    monkeypatch.chdir(tmp_path)
    a = make_model("a", toy())
    with pytest.raises(ModelError, match=words):
        plan_of(linear(f'"{reference.format(a=a)}"'), download=False)


def test_a_hub_id_is_found_in_the_cache_with_its_links(plan_of, make_model, tmp_path):
    a = make_model("plain", toy(), num_hidden_layers=4)
    (a / "tokenizer.json").write_text("{}")
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for path in a.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    plan = plan_of(linear("owner/name"), hub_cache=tmp_path / "hub", download=False)
    assert len(plan.tensors) == len(toy())
    out = tmp_path / "out"
    out.mkdir()
    plan.write_companions(out)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "tokenizer.json").is_symlink()
    assert "base_model:\n- owner/name\n" in (out / "README.md").read_text()


def test_twenty_thousand_tensors_are_planned_at_once(write_recipe, make_model):
    experts = {
        f"model.layers.{i // 200}.mlp.experts.{i % 200}.w": np.zeros(1, np.float32) for i in range(20_000)
    }
    a, b = (make_model(name, experts, num_hidden_layers=100) for name in "ab")
    text = linear(a, b).replace("weight: 1}", "weight: [{filter: experts.7, value: [0, 1]}, {value: 1}]}", 1)
    recipe = read(write_recipe(text))
    began = time.process_time()
    plan = plan_merge(recipe)
    assert len(plan.tensors) == 20_000
    assert time.process_time() - began < 3  # about 0.5 s; quadratic would be minutes
