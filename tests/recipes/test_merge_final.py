"""``--merge-final``: the adapter in its base, made by the merge engine, and compared with the adapter."""

import json
import shutil

import pytest
import torch

from toolkit.errors import MergeError, ModelError
from toolkit.modeling.logits_difference import LogitsDifference, logits_difference


def test_merged_and_compared(train, tiny_model):
    run = train("--max-steps", 3, "--merge-final", "--load-in-4bit", "--use-rslora")
    assert run.status == 0, run.err
    final = run.folder / "final_model"
    report = json.loads((final / "merged" / "merge_report.json").read_text())
    assert report["method"] == "linear"
    assert (final / "merged" / "chat_template.jinja").is_file()
    found = logits_difference(base=str(tiny_model), adapter=str(final), merged=str(final / "merged"))
    assert found.relative < 1e-5 < 1e-2 < found.effect
    assert f"largest difference of logits: {found}" in run.out
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".staging")]


def test_a_base_without_its_adapter_is_not_the_merged_model(train, tiny_model):
    run = train("--max-steps", 3)
    found = logits_difference(
        base=str(tiny_model), adapter=str(run.folder / "final_model"), merged=str(tiny_model)
    )
    assert found.relative == pytest.approx(found.effect, rel=1e-5)
    assert not found.is_rounding
    assert "rounding loses most of it" in str(found)


def test_a_merged_model_in_the_type_of_its_base(train, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(half)
    run = train("--model", half, "--max-steps", 3, "--merge-final")
    assert run.status == 0, run.err
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "final_model" / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    found = logits_difference(
        base=str(half),
        adapter=str(run.folder / "final_model"),
        merged=str(run.folder / "final_model" / "merged"),
    )
    assert 1e-4 < found.relative < 2e-2  # one rounding to bfloat16 is 2^-9


def test_a_classifier_keeps_the_names_of_its_classes(train, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from toolkit.modeling.samples import make

    rows = [
        {"text": f"turn on {word} {i}", "label": word}
        for i in range(8)
        for word in ("light", "music", "radio")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "sequence-classification", "--max-length", 64, "--max-steps", 2, "--merge-final"]
    model = make("tiny-xlm-r", tmp_path / "encoder")
    run = train("--model", model, "--data", tmp_path / "rows.jsonl", *options, defaults=False)
    assert run.status == 0, run.err
    merged = AutoModelForSequenceClassification.from_pretrained(run.folder / "final_model" / "merged")
    assert set(merged.config.id2label.values()) == {"light", "music", "radio"}
    assert merged.config.label2id[merged.config.id2label[1]] == 1


def test_a_gguf_base_is_refused_before_training(tmp_path):
    from toolkit.config.load import load
    from toolkit.config.recipes import RECIPES
    from toolkit.rounds.adapter_into_base import check_mergeable

    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    argv = ["--model", str(tmp_path / "tiny.gguf"), "--data", "d", "--output-dir", "o", "--merge-final"]
    with pytest.raises(ModelError, match="is a GGUF file"):
        check_mergeable(load(RECIPES["centralized-hf"], argv).config, None)


def test_a_quantized_base_is_refused_before_training(train, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    values = json.loads((model / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(values))
    run = train("--model", model, "--merge-final", "--max-steps", 1)
    assert run.status == 2
    assert "--merge-final" in run.err
    assert "is quantized itself" in run.err
    assert not (run.folder / "model").exists()


def test_a_merged_model_that_computes_something_else_is_an_error(train, monkeypatch):
    from toolkit.rounds import adapter_into_base

    wrong = LogitsDifference(largest=3.0, relative=0.2, effect=0.2)
    monkeypatch.setattr(adapter_into_base, "logits_difference", lambda **_: wrong)
    run = train("--max-steps", 1, "--merge-final")
    assert run.status == MergeError.exit_status == 1
    assert "does not compute what the adapter does" in run.err
    assert not (run.folder / "final_model").exists()
    monkeypatch.undo()
    again = train("--max-steps", 1, "--merge-final", "--resume")
    assert again.status == 0, again.err
    assert (run.folder / "final_model" / "merged" / "model.safetensors").is_file()
