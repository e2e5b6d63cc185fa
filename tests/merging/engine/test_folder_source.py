"""A folder as named tensors: shards, indices, adapters, tied heads; whatever does not fit together is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from toolkit.errors import ModelError
from toolkit.merging.streaming.folder_source import FolderSource

STATE = {name: torch.full((2,), float(i)) for i, name in enumerate("abcdef")}


def test_shards_are_one_model(tmp_path, write_model) -> None:
    source = FolderSource("m", write_model(tmp_path / "m", STATE, shards=3, architectures=["X"]))
    assert [file.name[:11] for file in source.files] == ["model-00001", "model-00002", "model-00003"]
    assert source.names() == ["a", "d", "b", "e", "c", "f"]  # by file, then by place
    assert source.reader("e").span(0, 2).data.tolist() == [4.0, 4.0]
    assert source.config == {"architectures": ["X"]}
    with pytest.raises(KeyError):
        source.reader("x")


def test_a_shard_that_is_missing_is_named(tmp_path, write_model) -> None:
    folder = write_model(tmp_path / "m", STATE, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        FolderSource("m", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(x=m["a"]), "lacks x"),
        (lambda m: m.pop("a"), "holds a"),
        (lambda m: m.update(a=m["b"]), "holds a"),
        (lambda m: m.update(a="../outside.safetensors"), "own folder"),
        (lambda m: m.update(a="/etc/passwd"), "own folder"),
        (lambda m: m.update(a=".."), "own folder"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, write_model, change, message) -> None:
    folder = write_model(tmp_path / "m", STATE, shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        FolderSource("m", folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\x00"])
def test_a_broken_index_is_refused(tmp_path, write_model, text: str) -> None:
    folder = write_model(tmp_path / "m", STATE, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json"):
        FolderSource("m", folder)


def test_a_single_file_beside_shards_is_what_transformers_loads(tmp_path, write_model, tiny_model) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "single")
    shutil.move(tmp_path / "single" / "model.safetensors", tmp_path / "m" / "model.safetensors")
    source = FolderSource("m", tmp_path / "m")
    assert [file.name for file in source.files] == ["model.safetensors"]
    (note,) = source.notes
    assert "model.safetensors.index.json" in note
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    name = source.names()[0]
    size = loaded[name].numel()
    assert not loaded[name].any()
    assert not source.reader(name).span(0, size).data.any()


def test_an_index_of_the_single_file_is_no_riddle(tmp_path, write_model) -> None:
    folder = write_model(tmp_path / "m", STATE)
    weight_map = dict.fromkeys(STATE, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert FolderSource("m", folder).notes == []


def test_an_adapter_is_a_plain_folder_of_tensors(tmp_path) -> None:
    save_file({"lora_A": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    source = FolderSource("a", tmp_path)
    assert source.names() == ["lora_A"]
    assert source.config == {"r": 8}


def test_a_single_file_of_another_name_is_found_and_two_are_not_guessed(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(STATE, tmp_path / "weights.safetensors")
    assert len(FolderSource("m", tmp_path).names()) == 6
    save_file(STATE, tmp_path / "more.safetensors")
    with pytest.raises(ModelError, match="no index"):
        FolderSource("m", tmp_path)


def test_a_tied_head_is_read_from_the_embedding(tmp_path, write_model) -> None:
    embedding = {"model.embed_tokens.weight": torch.full((3, 2), 7.0)}
    tied = FolderSource("m", write_model(tmp_path / "tied", embedding, tie_word_embeddings=True))
    assert tied.names() == ["model.embed_tokens.weight"]
    assert tied.reader("lm_head.weight").span(0, 6).data.tolist() == [7.0] * 6
    untied = FolderSource("m", write_model(tmp_path / "untied", embedding, tie_word_embeddings=False))
    with pytest.raises(KeyError):
        untied.reader("lm_head.weight")


@pytest.mark.parametrize(
    "what", ["no config", "config is no JSON", "config is a list", "no weights", "pickle"]
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, write_model, what: str) -> None:
    folder = write_model(tmp_path / "m", STATE)
    if what == "no config":
        (folder / "config.json").unlink()
    elif what.startswith("config"):
        (folder / "config.json").write_text("{" if what.endswith("JSON") else "[]")
    else:
        (folder / "model.safetensors").unlink()
        if what == "pickle":
            (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=str(folder)):
        FolderSource("m", folder)
