"""What a run leaves: the files of the document with their keys filled, and models that transformers and PEFT load."""

import re

import numpy as np
import pytest
import torch

FILES = [
    "experiment_config.json",
    "iterative_training.log",
    "state_summary.json",
    "merge_history.json",
    "final_statistics.json",
    "training_metrics.json",
    "training_alerts.json",
    "training_history.json",
    "report.html",
    "environment.json",
    "journal.jsonl",
    "final_model/README.md",
]
MAY_BE_EMPTY = {
    "gpu",
    "resumed_from",
    "error",
    "reason",
    "notes",
    "mean_change_rejected",
    "not_finite",
    "stopped",
    "failed",
    "alerts",
    "counts",
    "skipped",
    "rejected",
    "wait",
    "samples",
    "gate",
}
"""Keys of files that say what did not happen here."""


def empty_keys(value, place: str = "") -> list[str]:
    """Places of JSON values that are null, empty text, or empty containers."""
    if isinstance(value, dict) and value:
        return [
            p
            for key, entry in value.items()
            if key not in MAY_BE_EMPTY
            for p in empty_keys(entry, f"{place}/{key}")
        ]
    if isinstance(value, list) and value:
        return [p for number, entry in enumerate(value) for p in empty_keys(entry, f"{place}/{number}")]
    return [place] if value in (None, "", [], {}) else []


@pytest.fixture(scope="module")
def full(iterated):
    """Full fine-tuning with baselines and TensorBoard."""
    return iterated("--finetuning", "full", "--baselines", "--report-to", "tensorboard")


@pytest.fixture(scope="module")
def lora(iterated):
    return iterated("--baselines")


def test_every_file_of_the_document(full):
    assert not [name for name in FILES if not (full.folder / name).is_file()]
    for locale in ("en-US", "fr-FR"):
        assert list((full.folder / locale / "logs").glob("events.out.tfevents.*"))
        checkpoints = sorted(path.name for path in (full.folder / locale / "checkpoints").iterdir())
        assert checkpoints == ["checkpoint-00000002-merges-1", "checkpoint-00000004-merges-2"]
        assert (full.folder / locale / "final_model" / "model.safetensors").is_file()
    merged = sorted(path.name for path in (full.folder / "merged_models").iterdir())
    assert len(merged) == 2
    assert all(re.fullmatch(r"iterative_merge_en-US_fr-FR_\d{8}_\d{6}(-\d+)?", name) for name in merged)
    assert [merge["path"].rpartition("/")[2] for merge in full.merges] == merged


@pytest.mark.parametrize(
    "name", ["state_summary", "merge_history", "final_statistics", "training_metrics", "training_alerts"]
)
def test_every_key_is_filled(full, name):
    content = full.read(f"{name}.json")
    assert content
    assert empty_keys(content) == []


def test_the_files_agree(full):
    history, statistics = full.read("merge_history.json"), full.read("final_statistics.json")
    assert history["merged"] == statistics["merges"]["merged"] == len(full.events("merge")) == 2
    for merge, event in zip(full.merges, full.events("merge"), strict=True):
        assert merge["weights"] == event["weights"]
        assert merge["after"] == event["after"]
        assert merge["before"].keys() == merge["after"].keys() == merge["gate"].keys() == {"en-US", "fr-FR"}
        assert sum(merge["weights"]["en-US,fr-FR"].values()) == pytest.approx(1, abs=1e-12)
    summary = full.read("state_summary.json")
    metrics = full.read("training_metrics.json")["participants"]
    for locale in ("en-US", "fr-FR"):
        last = full.merges[-1]["after"][locale]
        state = summary["participants"][locale]
        assert {name: entry["last"] for name, entry in state["evaluation"].items()} == last
        assert {name: entry["final"] for name, entry in metrics[locale]["evaluation"].items()} == last
        assert metrics[locale]["curve"]["loss"] == full.losses(locale)
    assert set(statistics["comparison"]["participants"]["en-US"]["arms"]) == {
        *("base", "own_training", "last_merge", "best_source", "iterative")
    }
    log = (full.folder / "iterative_training.log").read_text()
    assert "merge after epoch 2" in log
    assert "en-US" in (full.folder / "report.html").read_text()
    assert "Did merging help?" in full.out


def predicted(model, tokenizer, intent_data, locale: str) -> np.ndarray:
    import json

    rows = [json.loads(line) for line in (intent_data / locale / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = [model(**tokenizer(row["utt"], return_tensors="pt")).logits[0] for row in rows]
    return torch.stack(logits).argmax(-1).numpy()


def measured(run, arm: str, locale: str) -> np.ndarray:
    return np.load(run.folder / "comparison" / arm / locale / f"{locale}.npz")["predicted"]


def test_full_models_load_and_are_those_that_were_measured(full, intent_data):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folders = {locale: full.folder / locale / "final_model" for locale in ("en-US", "fr-FR")}
    for locale, folder in folders.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert model.config.id2label == {0: "intent_0", 1: "intent_1", 2: "intent_2"}
        found = predicted(model, AutoTokenizer.from_pretrained(folder), intent_data, locale)
        assert found.tolist() == measured(full, "iterative", locale).tolist()
    for folder in (full.folder / "merged_models").iterdir():
        merged = AutoModelForSequenceClassification.from_pretrained(folder)
        assert merged.config.id2label[2] == "intent_2"
        AutoTokenizer.from_pretrained(folder)
    assert_same = full.tensors(".", "final_model")
    assert all(torch.equal(value, full.tensors("en-US")[name]) for name, value in assert_same.items())


def test_adapters_load_and_are_those_that_were_measured(lora, intent_data, tiny_encoder):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    newest = max((lora.folder / "merged_models").iterdir())
    for folder, arm in ((lora.folder / "fr-FR" / "final_model", "iterative"), (newest, "last_merge")):
        base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        found = predicted(model, AutoTokenizer.from_pretrained(folder), intent_data, "fr-FR")
        assert found.tolist() == measured(lora, arm, "fr-FR").tolist()


def test_the_comparison_reads_the_test_split(lora, intent_data):
    """Not the rows that gates and schedules choose by."""
    outcomes = np.load(lora.folder / "comparison" / "base" / "en-US" / "en-US.npz")
    labels = [
        int(line.split("intent_")[1][0])
        for line in (intent_data / "en-US" / "test.jsonl").read_text().splitlines()
    ]
    assert outcomes["expected"].tolist() == labels


def test_the_last_merge_is_not_what_was_trained_after_it(iterated):
    """Where nothing was, it is: then it is not measured again."""
    for epochs, is_the_same in ((2, True), (3, False)):
        folder = iterated("--max-epochs", epochs, "--merge-frequency", 2).folder / "comparison"
        losses = [
            np.load(folder / arm / "fr-FR" / "fr-FR.npz")["loss"] for arm in ("iterative", "last_merge")
        ]
        assert np.array_equal(*losses) == is_the_same
