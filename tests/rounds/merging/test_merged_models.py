"""Merged models on the disk: they load, they are whole or not there, and only the newest stay."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from toolkit.durable import verify_folder
from toolkit.errors import MergeError
from toolkit.rounds.journal import Journal
from toolkit.rounds.merging import MergedModels
from toolkit.rounds.merging.merged_models import folder_name

LOCALES = ("en-US", "fr-FR")
RECORD = {"weights": {"en-US": 0.5, "fr-FR": 0.5}, "method": "linear"}


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def add(tmp_path, model, tokenizer):
    """Add a merged model of a round; the weights are all ``value``."""

    def run(store: MergedModels, round_number: int, value: float = 0.5, names=LOCALES) -> Path:
        state = {name: torch.full_like(tensor, value) for name, tensor in model.state_dict().items()}
        return store.add(
            state,
            round_number=round_number,
            participants=names,
            model=model,
            adapter_config=None,
            tokenizer=tokenizer,
            record=RECORD,
        )

    return run


def test_a_full_model_loads_with_transformers(tmp_path, model, add):
    folder = add(MergedModels(tmp_path, Journal(tmp_path), keep=3), 1, value=0.25)
    assert folder.parent == tmp_path / "merged_models"
    assert folder.name.startswith("iterative_merge_en-US_fr-FR_20")
    verify_folder(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(bool((tensor == 0.25).all()) for tensor in loaded.values())
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert json.loads((folder / "merge_record.json").read_text()) == RECORD
    assert not bool((next(model.parameters()) == 0.25).all())  # the model in training is as it was


def test_an_adapter_loads_with_peft_and_knows_its_classes(tmp_path, tiny_model, tokenizer):
    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            tiny_model, num_labels=3, id2label={0: "no", 1: "yes", 2: "maybe"}, pad_token_id=0
        )

    peft_model = get_peft_model(base(), LoraConfig(task_type="SEQ_CLS", r=2), adapter_name="en-US")
    config = LoraConfig(task_type="SEQ_CLS", r=2)
    peft_model.add_adapter("fr-FR", config)
    state = {
        name: torch.randn_like(tensor)
        for name, tensor in get_peft_model_state_dict(peft_model, adapter_name="fr-FR").items()
    }
    folder = MergedModels(tmp_path, Journal(tmp_path), keep=3).add(
        state,
        round_number=1,
        participants=LOCALES,
        model=peft_model,
        adapter_config=peft_model.peft_config["fr-FR"],
        tokenizer=tokenizer,
        record=RECORD,
    )
    loaded = PeftModel.from_pretrained(base(), folder)
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["inference_mode"] is True
    assert adapter["base_model_name_or_path"] == str(tiny_model)
    assert peft_model.peft_config["fr-FR"].inference_mode is False
    assert json.loads((folder / "config.json").read_text())["id2label"] == {
        "0": "no",
        "1": "yes",
        "2": "maybe",
    }


def test_the_newest_rounds_are_kept(tmp_path, add):
    journal = Journal(tmp_path)
    store = MergedModels(tmp_path, journal, keep=2)
    made = [[add(store, number, names=(name,)) for name in LOCALES] for number in (1, 2, 3)]
    kept = [*made[1], *made[2]]
    assert store.present() == kept
    assert sorted(p.name for p in store.folder.iterdir()) == sorted(p.name for p in kept)
    # The journal says it, before it is done.
    assert [r["path"] for r in journal.records("merged_model_deleted")] == [p.name for p in made[0]]
    assert MergedModels(tmp_path, Journal(tmp_path), keep=2).present() == kept


def test_names_within_a_second_differ(tmp_path, add):
    store = MergedModels(tmp_path, Journal(tmp_path), keep=5)
    assert len({add(store, number).name for number in range(3)}) == 3


def test_leftovers_of_a_killed_run_go(tmp_path, add):
    journal = Journal(tmp_path)
    store = MergedModels(tmp_path, journal, keep=5)
    kept, unknown = add(store, 1), add(store, 2)
    journal.rewind(journal.records("merged_model")[0]["number"])
    (store.folder / ".staging-x").mkdir()
    store.recover()
    assert list(store.folder.iterdir()) == [kept]
    assert not unknown.exists()
    # A deletion that was taken back in the journal stays one on the disk.
    store = MergedModels(tmp_path, journal, keep=1)
    newer = add(store, 2)
    journal.rewind(journal.records("merged_model")[0]["number"])
    store.recover()
    assert not newer.exists()
    assert store.present() == []
    assert add(store, 2).is_dir()


def test_a_full_disk_leaves_nothing(tmp_path, add, model, monkeypatch):
    store = MergedModels(tmp_path, Journal(tmp_path), keep=1)
    first = add(store, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(MergeError, match="No space left on device"):
        add(store, 2)
    assert list(store.folder.iterdir()) == [first]
    assert store.present() == [first]


def test_long_lists_of_names_are_shortened():
    time = datetime(2023, 12, 14, 14, 30, 22, tzinfo=UTC)
    assert folder_name(LOCALES, time) == "iterative_merge_en-US_fr-FR_20231214_143022"
    many = [f"l{number}" for number in range(52)]
    assert folder_name(many, time) == "iterative_merge_l0_l1_l2_l3_l4_and-47-more_20231214_143022"
    assert folder_name(many[:6], time) == "iterative_merge_l0_l1_l2_l3_l4_l5_20231214_143022"
