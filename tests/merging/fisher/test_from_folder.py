"""From folders and data files: Python's fisher_of and the command."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from toolkit.errors import ConfigError, DataError, ModelError
from toolkit.merging.fisher import Fisher, fisher_of
from toolkit.merging.fisher.commands import fisher as command
from toolkit.merging.fisher.from_folder import class_numbers

CLASSES = ["alarm_set", "music_play", "weather_query"]
TEXTS = {
    "alarm_set": "wake me at six",
    "music_play": "play the red rose",
    "weather_query": "will it rain on sunday",
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny XLM-R with three named classes."""
    from toolkit.modeling.samples import make

    folder = make("tiny-xlm-r", tmp_path_factory.mktemp("models") / "tiny-xlm-r")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=3,
        id2label=dict(enumerate(CLASSES)),
        label2id={c: n for n, c in enumerate(CLASSES)},
    )
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def intents(tmp_path):
    """Rows of two of the three classes: numbered alone, they would be 0 and 1."""
    path = tmp_path / "intents.jsonl"
    rows = [
        {"text": f"{TEXTS[c]} {n}", "label": c} for n in range(3) for c in ("weather_query", "music_play")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def names_in(path) -> set[str]:
    with safe_open(path, framework="pt") as stream:
        return set(stream.keys())


def test_classes_are_those_of_the_model(classifier, intents, loop, assert_equal_fisher) -> None:
    found = fisher_of(classifier, intents, num_examples=None, batch_size=4, dtype="float32")
    assert found.task == "sequence-classification"
    assert found.tensors.keys() == names_in(classifier / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    rows = [json.loads(line) for line in intents.read_text().splitlines()]
    examples = [
        {"input_ids": tokenizer(row["text"]).input_ids, "labels": CLASSES.index(row["label"])} for row in rows
    ]
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    assert_equal_fisher(found.tensors, loop(model, examples, "sequence-classification"))


def test_the_command_writes_the_file(tiny_model, chat_data, tmp_path, capsys) -> None:
    out = tmp_path / "fisher.safetensors"
    arguments = ["--model", str(tiny_model), "--data", str(chat_data["train"]), "--out", str(out)]
    assert (
        command([*arguments, "--num-examples", "6", "--batch-size", "4", "--kind", "true", "--seed", "1"])
        == 0
    )
    assert "6 examples" in capsys.readouterr().out
    written = Fisher.load(out)
    assert (written.num_examples, written.kind, written.task) == (6, "true", "causal-lm")
    assert written.tensors.keys() == names_in(tiny_model / "model.safetensors")
    again = fisher_of(tiny_model, chat_data["train"], num_examples=6, batch_size=1, kind="true", seed=1)
    assert again.data_fingerprint == written.data_fingerprint
    for name, tensor in again.tensors.items():
        torch.testing.assert_close(written.tensors[name], tensor, rtol=1e-3, atol=1e-5 * tensor.max().item())


def test_an_adapter(tiny_model, chat_data, tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, options).save_pretrained(tmp_path / "adapter")
    found = fisher_of(tiny_model, chat_data["train"], adapter=tmp_path / "adapter", num_examples=4)
    assert found.tensors.keys() == names_in(tmp_path / "adapter" / "adapter_model.safetensors")
    # A new adapter's B is zero: nothing depends on A yet.
    assert not any(t.any() for name, t in found.tensors.items() if "lora_A" in name)
    assert all(t.any() for name, t in found.tensors.items() if "lora_B" in name)


def test_the_adapter_of_a_classifier_names_its_classes(classifier, intents, tmp_path) -> None:
    options = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(classifier)
    model: PeftModel = get_peft_model(base, options)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        fisher_of(classifier, intents, adapter=tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    found = fisher_of(classifier, intents, adapter=tmp_path / "adapter")
    assert found.tensors.keys() == names_in(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("classifier.out_proj" in name for name in found.tensors)


def test_a_head_that_was_never_trained_is_refused(classifier, intents, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(classifier, tmp_path / "headless")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "out_proj" not in n}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no tensor classifier\.out_proj\.bias \(2 of"):
        fisher_of(folder, intents)


@pytest.fixture
def hub_id(classifier, tmp_path, monkeypatch) -> str:
    """The classifier in the hub's cache of a machine without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--intents"
    shutil.copytree(classifier, repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    return "owner/intents"


def test_a_hub_id_says_its_task_too(hub_id, intents) -> None:
    found = fisher_of(hub_id, intents, num_examples=2, max_length=16)
    assert found.task == "sequence-classification"
    assert any("classifier.out_proj" in name for name in found.tensors)


def test_a_hub_id_with_a_head_that_was_never_trained_is_refused(hub_id, intents, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    (weights,) = tmp_path.glob("hub/*/snapshots/*/model.safetensors")
    tensors = {n: t for n, t in load_file(weights).items() if "out_proj" not in n}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"snapshots/1+ has no tensor classifier\.out_proj\.bias \(2 of"):
        fisher_of(hub_id, intents, num_examples=2, max_length=16)


def test_class_numbers() -> None:
    assert class_numbers(["b", "c"], ["a", "b", "c"]) == [1, 2]
    assert class_numbers(["x", "y"], ["LABEL_0", "LABEL_1"]) == [0, 1]
    with pytest.raises(DataError, match="does not have 'x'"):
        class_numbers(["a", "x"], ["a", "b"])
    with pytest.raises(DataError, match="2 classes, the model 3"):
        class_numbers(["x", "y"], ["LABEL_0", "LABEL_1", "LABEL_2"])


def test_the_command_explains_itself(capsys) -> None:
    assert command(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--num-examples" in text
    assert "--kind" in text
    assert command([]) == 2
    with pytest.raises(ConfigError, match="did you mean"):
        command(["--model", "m", "--data", "d", "--out", "o", "--num-example", "3"])
