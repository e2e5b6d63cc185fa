"""mergekit's recipes of every kind are read; what is wrong in one is said with file, line and the nearest name."""

import pytest

from toolkit.errors import ConfigError
from toolkit.merging.recipes.recipe import Condition, Location, ModelReference
from toolkit.merging.recipes.recipe_file import read
from toolkit.merging.registry import merge_methods

LINEAR = """
models:
  - model: owner/one
    parameters:
      weight: 1.0
  - model: owner/two@v2+owner/adapter@main
    parameters:
      weight: [0, 0.5, 1]
merge_method: linear
dtype: float16
"""
SLERP = """
slices:
  - sources:
      - model: owner/one
        layer_range: [0, 32]
      - model: owner/two
        layer_range: [0, 32]
merge_method: slerp
base_model: owner/one
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for the rest
dtype: bfloat16
"""
TIES = """
models:
  - model: owner/base
  - model: owner/one
    parameters: {density: 0.5, weight: 0.5}
  - model: owner/two
    parameters:
      density: 0.53
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: owner/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
tokenizer_source: union
chat_template: chatml
"""
PASSTHROUGH = """
slices:
- sources:
  - model: owner/one
    layer_range: [0, 24]
- sources:
  - model: owner/two
    layer_range: [8, 32]
    parameters:
      scale:
        - {filter: o_proj, value: 0.0}
        - {value: 1.0}
merge_method: passthrough
"""
TOKENS = """
merge_method: linear
parameters: {weight: 1}
models: [{model: owner/one}, {model: {model: {path: owner/two, revision: v1}, lora: owner/adapter}}]
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>: {source: owner/one, force: true}
    <unused>: {source: {kind: zero}}
    <|im_end|>: {source: {kind: model_token, model: owner/one, token: </s>}}
    <pad>: {source: {kind: model_token, model: owner/one, token_id: 3}}
"""
FISHER = """
merge_method: fisher
models:
  - model: owner/one
    parameters: {fisher: one.fisher.safetensors}
  - model: owner/two
    parameters: {preconditioner_path: two.fisher.safetensors, weight: 2}
parameters: {fisher_normalize: tensor, fisher_floor: 1e-4}
"""
MODULES = """
merge_method: task_arithmetic
base_model: owner/base
modules:
  text_decoder:
    slices:
      - sources:
          - {model: owner/base, layer_range: [0, 2]}
          - {model: owner/one, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 1}]}}
  vision_tower:
    models:
      - model: owner/base
      - model: owner/one
        parameters: {weight: 0.5}
"""
ALIASES = """
merge_method: linear
x-none: &same {weight: 0.5}
models:
  - model: owner/one
    parameters: *same
  - model: owner/two
    parameters:
      <<: *same
"""


@pytest.mark.parametrize(
    "text", [LINEAR, SLERP, TIES, PASSTHROUGH, TOKENS, FISHER, MODULES], ids=lambda text: text.split()[0]
)
def test_recipes_of_every_kind_are_read(write_recipe, text):
    recipe = read(write_recipe(text))
    assert recipe.text == text
    assert recipe.merge_method in merge_methods()
    assert recipe.references()


def test_models_and_their_parameters(write_recipe):
    recipe = read(write_recipe(LINEAR))
    first, second = recipe.models
    assert first.model == ModelReference(Location("owner/one"))
    assert second.model == ModelReference(Location("owner/two", "v2"), (Location("owner/adapter", "main"),))
    assert str(second.model) == "owner/two@v2+owner/adapter@main"
    assert second.parameters["weight"].conditions == (Condition((0, 0.5, 1)),)
    assert second.parameters["weight"].place.endswith("merge.yml:8")
    assert recipe.dtype == "float16"


def test_filters_keep_their_order(write_recipe):
    conditions = read(write_recipe(SLERP)).parameters["t"].conditions
    assert [condition.filter for condition in conditions] == ["self_attn", "mlp", None]
    assert conditions[2].value == 0.5


def test_long_model_references(write_recipe):
    second = read(write_recipe(TOKENS)).models[1].model
    assert second == ModelReference(Location("owner/two", "v1"), (Location("owner/adapter"),))


def test_token_sources(write_recipe):
    request = read(write_recipe(TOKENS)).tokenizer
    assert request is not None
    assert (request.source, request.pad_to_multiple_of) == ("union", 64)
    kinds = {token: (source.kind, source.force) for token, source in request.tokens.items()}
    assert kinds == {
        "<|im_start|>": ("model", True),
        "<unused>": ("zero", False),
        "<|im_end|>": ("model_token", False),
        "<pad>": ("model_token", False),
    }


def test_a_folder_with_a_plus_or_an_at_in_its_name_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b@c").mkdir()
    assert ModelReference.parse("a+b@c") == ModelReference(Location("a+b@c"))
    assert ModelReference.parse("a+b").loras == (Location("b"),)


def test_lenient_passes_unknown_names_with_a_note(write_recipe):
    path = write_recipe(ALIASES)
    with pytest.raises(ConfigError, match=r"merge\.yml:3: unknown key 'x-none'"):
        read(path)
    recipe = read(path, lenient=True)
    assert [entry.parameters["weight"].conditions[0].value for entry in recipe.models] == [0.5, 0.5]
    assert "unknown key 'x-none'" in recipe.notes[0]


def problems_of(path, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(path, **options)
    return [problem.removeprefix(f"{path.parent}/") for problem in caught.value.problems]


def test_all_problems_come_at_once(write_recipe):
    path = write_recipe(
        """merge_method: ties
models:
  - model: A/x
    parameters:
      wieght: 0.5
      density: [0, fast]
  - model: B/y
    weight: 3
    parameters:
      weight: 0.5
      normalize: true
base_model: C/z
dtpye: bfloat16
dtype: bf17
parameters:
  normalise: yes
  lambda: {value: 1, filtr: mlp}
"""
    )
    assert problems_of(path) == [
        "merge.yml:3: ties needs the parameter 'weight' for A/x",
        "merge.yml:5: ties has no parameter 'wieght'; did you mean 'weight'?",
        "merge.yml:6: density: 'fast' is not a number",
        "merge.yml:8: unknown key 'models.weight'; 'weight' belongs under 'parameters:'",
        "merge.yml:11: 'normalize' is one value for all models; it belongs under the 'parameters:' beside merge_method",
        "merge.yml:13: unknown key 'dtpye'; did you mean 'dtype'?",
        "merge.yml:14: dtype: 'bf17' is not one of bfloat16, float16, float32, float64",
        "merge.yml:16: ties has no parameter 'normalise'; did you mean 'normalize'?",
        "merge.yml:17: unknown key 'lambda.filtr'; did you mean 'filter'?",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{model: a}]", "merge_method is missing"),
        ("merge_method: lineer\nmodels: [{model: a}]", "no merge method 'lineer'; did you mean 'linear'?"),
        ("merge_method: linear", "one of models, slices and modules is needed; none"),
        ("merge_method: linear\nmodels: [{model: a}]\nslices: []", "'models' and 'slices' are given"),
        ("merge_method: linear\nmodels: []", "models is a list with at least one element"),
        ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "model is missing"),
        (
            "merge_method: linear\nmodels: [{model: a@b@c, parameters: {weight: 1}}]",
            "is not PATH or PATH@REVISION",
        ),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]", "weight: the list is empty"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "is not a number"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: true}}]",
            "weight: true is not a number",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, {value: 2}]}}]",
            "either values, or value and filter",
        ),
        ("merge_method: linear\nmodels: [{model: a}]", "linear needs the parameter 'weight' for a"),
        (
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: a}]",
            "a is given twice",
        ),
        ("merge_method: ties\nparameters: {weight: 1}\nmodels: [{model: a}]", "ties needs base_model"),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0}\nmodels: [{model: a}, {model: b}, {model: c}]",
            "slerp takes 1 model beside base_model, not 2",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]",
            "slerp needs the parameter 't'",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1, density: 0.5}\nmodels: [{model: a}]",
            "linear has no parameter 'density'",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [4, 4]}]}]",
            "[4, 4] has no layer; END is not included",
        ),
        ("merge_method: passthrough\nslices: [{sources: [{model: a}]}]", "layer_range is [FIRST, END]"),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0}\n"
            "slices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 5]}]}]",
            "the same number of layers, not 4 of a, 5 of b",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}]\n"
            "tokenizer_source: base\ntokenizer: {source: union}",
            "tokenizer and tokenizer_source are both given",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}]\n"
            "tokenizer: {tokens: {x: {source: {kind: zeros}}}}",
            "did you mean 'zero'?",
        ),
        ("merge_method: fisher\nmodels: [{model: a}]", "fisher needs the parameter 'fisher' for a"),
        ("- a\n- b\n", "holds a list"),
        ("", "the file is empty"),
    ],
)
def test_what_is_wrong_is_said(write_recipe, text, words):
    problems = problems_of(write_recipe(text))
    assert any(words in problem for problem in problems), problems


def test_a_recipe_that_is_not_there_names_its_neighbour(write_recipe, tmp_path):
    write_recipe(LINEAR)
    assert "no such file; did you mean" in problems_of(tmp_path / "mergee.yml")[0]


def test_int8_mask_is_no_problem(write_recipe):
    assert "int8_mask" in read(write_recipe(TIES)).parameters
