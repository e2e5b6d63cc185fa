"""Different vocabularies: whose embedding a token gets, by hand; tokenizers that transformers can load."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from toolkit.errors import ModelError
from toolkit.merging.group import MemoryReader
from toolkit.merging.recipes.recipe import Location, ModelReference, TokenizerRequest, TokenSource
from toolkit.merging.recipes.rows import widened
from toolkit.merging.recipes.tokenizer import unify
from toolkit.merging.recipes.vocabulary import Truncated, has_row_for_each_token
from toolkit_kernels.spans import Span

NAME = "model.embed_tokens.weight"
A, B, C = (ModelReference(Location(name)) for name in "abc")
WORDS = {
    A: ["<s>", "red", "blue"],
    B: ["<s>", "blue", "green", "wine"],
    C: ["<s>", "wine", "green", "sea"],
}
ROWS = {
    A: np.array([[1, 1], [2, 2], [3, 3], [9, 9]], np.float32),  # one row of padding
    B: np.array([[10, 10], [20, 20], [30, 30], [40, 40]], np.float32),
    C: np.array([[100, 100], [200, 200], [300, 300], [400, 400]], np.float32),
}


def memory(values: np.ndarray, where: str) -> MemoryReader:
    return MemoryReader(Span.of(values), values.shape, "float32", where)


def write_tokenizer(folder: Path, words: list[str], special: tuple[str, ...] = ("<s>",)) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folders(tmp_path) -> dict[ModelReference, Path]:
    return {model: write_tokenizer(tmp_path / str(model), words) for model, words in WORDS.items()}


def unified(folders, source="union", tokens=None, multiple=None, base=A):
    request = TokenizerRequest(source, tokens or {}, multiple, "merge.yml:1")
    return unify(request, base, folders, folders.get(base) or Path(str(base)), lambda model: folders[model])


def rows_of(found, models=(A, B, C)) -> dict[ModelReference, np.ndarray]:
    readers = {model: memory(ROWS[model], str(model)) for model in models}
    aligned = found.aligned(NAME, readers)
    return {
        model: widened(reader.span(0, int(np.prod(reader.shape))), "float64").reshape(reader.shape)
        for model, reader in aligned.items()
    }


def test_union_by_hand(folders):
    found = unified(folders)
    assert sorted(found.tokens, key=found.tokens.__getitem__) == [
        "<s>",
        "red",
        "blue",
        "green",
        "wine",
        "sea",
    ]
    rows = rows_of(found)
    # red: only A has it. blue: A is the base and has it. sea: only C has it.
    # green, wine: B and C have them and keep their own, A gets the mean.
    green, wine = [(30 + 300) / 2] * 2, [(40 + 200) / 2] * 2
    np.testing.assert_array_equal(rows[A], [[1, 1], [2, 2], [3, 3], green, wine, [400, 400]])
    np.testing.assert_array_equal(rows[B], [[10, 10], [2, 2], [20, 20], [30, 30], [40, 40], [400, 400]])
    np.testing.assert_array_equal(rows[C], [[100, 100], [2, 2], [3, 3], [300, 300], [200, 200], [400, 400]])


def test_base_keeps_the_bases_tokens_and_rows(folders):
    rows = rows_of(unified(folders, "base"))
    np.testing.assert_array_equal(rows[A], ROWS[A])  # with its padding
    np.testing.assert_array_equal(rows[B][:3], [[10, 10], [2, 2], [20, 20]])
    np.testing.assert_array_equal(rows[B][3], rows[B][:3].mean(axis=0).astype(np.float32))


def test_the_tokenizer_of_another_model(folders):
    rows = rows_of(unified(folders, C))
    np.testing.assert_array_equal(rows[C], ROWS[C])
    np.testing.assert_array_equal(rows[B], [[10, 10], [40, 40], [30, 30], [400, 400]])
    # A is the base, but has neither wine nor green.
    np.testing.assert_array_equal(rows[A], [[1, 1], [120, 120], [165, 165], [400, 400]])


def test_the_number_of_rows_can_be_a_multiple(folders):
    rows = rows_of(unified(folders, multiple=4))
    assert {len(values) for values in rows.values()} == {8}
    for values in rows.values():
        np.testing.assert_allclose(values[6:], [values[:6].mean(axis=0)] * 2, rtol=1e-7)


def fisher_of(found, models=(A, B, C)) -> dict[ModelReference, np.ndarray]:
    """The Fisher information -theta in the order of the result."""
    readers = {model: memory(ROWS[model], str(model)) for model in models}
    own = {model: memory(-ROWS[model], "fisher") for model in models}
    aligned = found.aligned_fisher(NAME, readers, own)
    return {
        model: widened(reader.span(0, int(np.prod(reader.shape))), "float64").reshape(reader.shape)
        for model, reader in aligned.items()
    }


def test_fisher_rows_go_where_the_rows_of_the_embedding_go(folders):
    # <s>, red, blue, green, wine, sea; see test_union_by_hand.
    fisher = fisher_of(unified(folders))
    np.testing.assert_array_equal(fisher[A][:, 0], [-1, -2, -3, 0, 0, 0])
    np.testing.assert_array_equal(fisher[B][:, 0], [-10, 0, -20, -30, -40, 0])
    np.testing.assert_array_equal(fisher[C][:, 0], [-100, 0, 0, -300, -200, -400])


def test_fisher_of_padding_and_of_forced_tokens(folders):
    fisher = fisher_of(unified(folders, "base"))
    np.testing.assert_array_equal(fisher[A], -ROWS[A])  # its padding is its own
    np.testing.assert_array_equal(fisher[B][:, 0], [-10, 0, -20, 0])
    fisher = fisher_of(unified(folders, "base", {"blue": source("model", B, force=True)}))
    np.testing.assert_array_equal(fisher[A][:, 0], [-1, -2, 0, -9])
    np.testing.assert_array_equal(fisher[B][:, 0], [-10, 0, 0, 0])


def source(kind: str, model=None, token=None, number=None, *, force=False) -> TokenSource:
    return TokenSource(kind, model, token, number, force, "merge.yml:9")


def test_sources_of_single_tokens(folders):
    tokens = {
        "blue": source("model", B),  # only where it is missing
        "red": source("zero"),
        "sea": source("model_token", B, "wine", force=True),
        "new": source("model_token", A, None, 3),
    }
    found = unified(folders, tokens=tokens)
    numbers, rows = found.tokens, rows_of(found)
    assert numbers["new"] == 6
    for model, expected in ((A, 3), (B, 20), (C, 20)):
        assert rows[model][numbers["blue"]][0] == expected
    for model, expected in ((A, 2), (B, 0), (C, 0)):
        assert rows[model][numbers["red"]][0] == expected
    for model in (A, B, C):
        assert rows[model][numbers["sea"]][0] == 40
        assert rows[model][numbers["new"]][0] == 9


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (source("model", B), "'red': b has no embedding of 'red'"),
        (source("model_token", A, None, 77), "'red': a has no embedding of number 77"),
        (source("model", ModelReference(Location("x"))), "is not merged from x"),
    ],
)
def test_sources_that_are_not_there(folders, request_, words):
    with pytest.raises(ModelError, match=rf"merge\.yml:9: .*{words}"):
        rows_of(unified(folders, tokens={"red": request_}))


def test_a_token_that_no_model_has_is_zero_and_noted(folders):
    found = unified(folders, tokens={"new": source("default")})
    assert not rows_of(found)[B][found.tokens["new"]].any()
    assert "no model has an embedding of 'new'; they are zeros" in found.notes[-1]


def test_a_model_without_tokenizer_is_taken_to_have_the_bases(folders):
    (folders[B] / "tokenizer.json").unlink()
    found = unified(folders, "base")
    assert found.notes == ["b has no tokenizer: taken to have the tokens of a"]
    np.testing.assert_array_equal(rows_of(found)[B], ROWS[B])


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken", "tokenizer_config.json"]
)
def test_a_tokenizer_in_another_form_is_not_taken_to_be_the_bases(folders, name):
    (folders[B] / "tokenizer.json").rename(folders[B] / name)
    with pytest.raises(ModelError, match=rf"merge\.yml:1: .*b has {name} and no tokenizer\.json") as caught:
        unified(folders, "base")
    assert "save_pretrained" in str(caught.value)


def test_a_base_without_tokenizer_is_an_error(folders):
    (folders[A] / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"merge\.yml:1: .*has no tokenizer\.json"):
        unified(folders)


def test_a_damaged_tokenizer_is_named(folders):
    (folders[C] / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"c/tokenizer\.json cannot be read"):
        unified(folders)


def test_special_tokens_stay_special(tmp_path):
    folders = {
        A: write_tokenizer(tmp_path / "a", WORDS[A]),
        B: write_tokenizer(tmp_path / "b", ["<s>", "<eot>", "blue"], special=("<s>", "<eot>")),
    }
    found = unified(folders)
    assert found.tokenizer.get_added_tokens_decoder()[found.tokens["<eot>"]].special
    written = json.loads(found.tokenizer.to_str())
    assert [token["content"] for token in written["added_tokens"]] == ["<s>", "<eot>"]
    assert found.tokenizer.encode("red <eot> blue").tokens == ["red", "<eot>", "blue"]


def test_truncation_cuts_to_the_smallest():
    found = Truncated()
    readers = {A: memory(ROWS[A][:3], "a"), B: memory(ROWS[B], "b")}
    aligned = found.aligned(NAME, readers)
    assert aligned[A] is readers[A]
    assert aligned[B].shape == (3, 2)
    np.testing.assert_array_equal(aligned[B].span(0, 6).data, ROWS[B][:3].reshape(-1))
    assert found.notes == [f"{NAME}: cut to 3 rows in b; tokens keep their numbers"]
    fisher = found.aligned_fisher(NAME, readers, readers)
    assert [reader.shape for reader in fisher.values()] == [(3, 2), (3, 2)]


def test_which_tensors_have_a_row_for_each_token():
    for name in (
        NAME,
        "lm_head.weight",
        "transformer.wte.weight",
        "cls.predictions.bias",
        "embed_out.weight",
    ):
        assert has_row_for_each_token(name), name
    for name in (
        "model.norm.weight",
        "position_embeddings.weight",
        "my_lm_head.weight",
        "lm_head.weight.scale",
    ):
        assert not has_row_for_each_token(name), name
