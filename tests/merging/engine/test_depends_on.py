"""Whatever a recipe reads is an input: it is never the output, and a resumed merge looks whether it changed."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from toolkit.errors import RunDirectoryError
from toolkit.merging.folders import merge_folders
from toolkit.merging.recipes.resolve import PlanOptions
from toolkit.merging.streaming.engine import EngineOptions


@pytest.fixture
def folders(tmp_path, tiny_model) -> dict[str, Path]:
    names = ("first", "second", "base", "vocabulary")
    for name in names:
        shutil.copytree(tiny_model, tmp_path / name)
    return {name: tmp_path / name for name in names}


@pytest.mark.parametrize("out", ["first", "base", "vocabulary"])
def test_no_model_of_a_recipe_is_deleted(folders, out) -> None:
    recipe = {
        "merge_method": "linear",
        "base_model": str(folders["base"]),
        "parameters": {"weight": 1},
        "tokenizer": {"source": str(folders["vocabulary"])},
        "models": [{"model": str(folders[n])} for n in ("first", "second")],
    }
    before = sorted(path.name for path in folders[out].iterdir())
    with pytest.raises(RunDirectoryError, match="is one of the inputs"):
        merge_folders(
            recipe,
            folders[out],
            plan_options=PlanOptions(write_card=False),
            engine_options=EngineOptions(overwrite=True),
        )
    assert sorted(path.name for path in folders[out].iterdir()) == before


def test_a_model_with_two_sets_of_weights_is_noted(folders, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(folders["second"]).save_pretrained(
        tmp_path / "shards", max_shard_size="200KB"
    )
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, folders["second"])
    report = merge_folders(
        {
            "merge_method": "linear",
            "models": [{"model": str(folders[n]), "parameters": {"weight": 1}} for n in ("first", "second")],
        },
        tmp_path / "out",
    )
    assert any("second has model.safetensors and shards" in note for note in report.notes)
