"""Files beside the models: Fisher information and Gram matrices, compared with the models and seen by --resume."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from toolkit.errors import ModelError
from toolkit.merging.recipes.recipe_file import read
from toolkit.merging.recipes.resolve import PlanOptions, plan_merge

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture
def fisher_merge(write_recipe):
    """The plan of a Fisher merge of folders and files."""

    def plan(pairs, top: str = "", **options):
        entries = "".join(f"  - {{model: {m}, parameters: {{fisher: {f}}}}}\n" for m, f in pairs)
        return plan_merge(
            read(write_recipe(f"merge_method: fisher\nmodels:\n{entries}{top}")), PlanOptions(**options)
        )

    return plan


def save(path, tensors: dict[str, np.ndarray]):
    save_file({name: np.asarray(values, np.float32) for name, values in tensors.items()}, path)
    return path


def test_fisher_of_another_model_is_an_error(fisher_merge, make_model, tmp_path):
    a, b = (make_model(name, {NORM: np.ones(2, np.float32)}) for name in "ab")
    own = save(tmp_path / "own.safetensors", {NORM: [1, 2]})
    for name, tensors in (
        ("prefixed", {f"base_model.{NORM}": [1, 2]}),
        ("more", {NORM: [1, 2], "model.extra": [3]}),
        ("none", {}),
    ):
        other = save(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(ModelError, match=rf"{name}\.safetensors holds"):
            fisher_merge([(a, own), (b, other)])
    assert fisher_merge([(a, own), (b, own)]).notes == [f"{a} has no tokenizer: none is written"]


def test_fisher_of_a_tied_head_belongs_to_the_model(fisher_merge, make_model, tmp_path):
    a, b = (
        make_model(name, {EMBEDDING: np.ones((2, 2), np.float32)}, tie_word_embeddings=True) for name in "ab"
    )
    file = save(tmp_path / "f.safetensors", {EMBEDDING: np.ones((2, 2)), "lm_head.weight": np.ones((2, 2))})
    assert len(fisher_merge([(a, file), (b, file)]).tensors) == 1


def test_fisher_is_aligned_with_the_vocabulary(run_merge, write_recipe, make_model, tmp_path):
    words = {"a": ["<s>", "red", "blue"], "b": ["<s>", "blue", "green"]}
    theta = {"a": [[1.0], [2.0], [3.0]], "b": [[10.0], [20.0], [30.0]]}
    fisher = {"a": [[1.0], [1.0], [1.0]], "b": [[1.0], [3.0], [2.0]]}
    entries = ""
    for name in "ab":
        folder = make_model(name, {EMBEDDING: np.array(theta[name], np.float32)}, vocab_size=3)
        Tokenizer(models.WordLevel({word: n for n, word in enumerate(words[name])}, unk_token="<s>")).save(
            str(folder / "tokenizer.json")
        )
        file = save(tmp_path / f"{name}.safetensors", {EMBEDDING: fisher[name]})
        entries += f"  - {{model: {folder}, parameters: {{fisher: {file}}}}}\n"
    recipe = write_recipe(
        f"merge_method: fisher\nmodels:\n{entries}tokenizer_source: union\n"
        "parameters: {fisher_normalize: none, fisher_floor: 0}\n"
    )
    status, _, errors = run_merge(recipe, tmp_path / "out")
    assert (status, errors) == (0, "")
    from safetensors.numpy import load_file

    merged = load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING][:, 0]
    # <s>: (1 + 10) / 2; red: only a has it; blue: (1 * 3 + 3 * 20) / 4; green: only b has it.
    np.testing.assert_array_equal(merged, [5.5, 2, 15.75, 30])


def gram_file(path, size: int):
    path.parent.mkdir(exist_ok=True)
    matrix = np.eye(size, dtype=np.float32)
    save_file({"x.weight": matrix}, path, {"format": "meldkit-grams-1", "num_examples": "1"})
    return path


def test_gram_files_are_inputs(run_merge, write_recipe, make_model, tmp_path):
    grams = {name: gram_file(tmp_path / "grams" / f"{name}.safetensors", 3) for name in "ab"}
    folders = {name: make_model(name, {"x.weight": np.ones((2, 3), np.float32)}) for name in "ab"}
    entries = "".join(f"  - {{model: {folders[n]}, parameters: {{gram: {grams[n]}}}}}\n" for n in "ab")
    recipe = write_recipe(f"merge_method: regmean\nmodels:\n{entries}")
    status, out, _ = run_merge(recipe, tmp_path / "out", "--dry-run")
    assert status == 0
    assert f"gram [{grams['a']}, {grams['b']}]" in out
    assert run_merge(recipe, tmp_path / "out")[0] == 0
    inputs = json.loads((tmp_path / "out" / "merge_report.json").read_text())["inputs"]
    found = [(entry["role"], entry["label"], bool(entry["files"][0]["sha256"])) for entry in inputs[2:]]
    assert found == [("gram", str(grams["a"]), True), ("gram", str(grams["b"]), True)]
    grams["b"].unlink()
    status, _, errors = run_merge(recipe, tmp_path / "other")
    assert status == 2
    assert f"there is no file {grams['b']}, which 'gram' names" in errors
