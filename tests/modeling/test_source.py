"""What is believed of a model folder before transformers sees it."""

import json
import shutil

import pytest

from toolkit.errors import ModelError
from toolkit.modeling.source import find_model, model_fingerprint


@pytest.fixture
def folder(tiny_model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    return copy


def test_folder_hub_id_and_gguf(folder, tmp_path):
    assert find_model(str(folder)).is_local
    hub = find_model("Qwen/Qwen3-8B-Base")
    assert (hub.name, hub.is_local, hub.gguf_file) == ("Qwen/Qwen3-8B-Base", False, None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    gguf = find_model(str(tmp_path / "m.gguf"))
    assert (gguf.name, gguf.gguf_file) == (str(tmp_path), "m.gguf")


def test_a_path_that_is_not_there_names_its_neighbours(folder):
    with pytest.raises(ModelError, match="does not exist") as caught:
        find_model(str(folder.parent / "modell"))
    assert "model" in caught.value.hint


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_a_shard_index_may_not_leave_the_folder(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ModelError, match="not in the model's own folder"):
        find_model(str(folder))


def test_incomplete_and_foreign_folders(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "gone.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"gone\.safetensors is missing"):
        find_model(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors weights") as caught:
        find_model(str(folder))
    assert "pickle" in caught.value.hint
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        find_model(str(folder))
    assert "base model" in caught.value.hint


def test_fingerprint_sees_weights_tokenizer_and_config(folder):
    def fingerprint():
        return model_fingerprint(find_model(str(folder)), None, None)

    first = fingerprint()
    assert fingerprint() == first
    for name in ("config.json", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert fingerprint() != first, name
        (folder / name).write_bytes(content)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4])
    assert fingerprint() != first
    assert model_fingerprint(find_model("org/name"), None, "abc") == "org/name@abc"


def test_revision_and_remote_code_reach_from_pretrained():
    source = find_model("org/name")
    assert source.keywords(revision=None, trust_remote_code=False) == {"trust_remote_code": False}
    given = source.keywords(revision="abc", trust_remote_code=True)
    assert given == {"trust_remote_code": True, "revision": "abc"}
