"""Outcomes of held-out rows: row by row, whatever the batch, the padding and the number of processes."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import toolkit.evaluation.held_out as held_out
from toolkit.data.collate import Collator
from toolkit.errors import DataError
from toolkit.evaluation.held_out import evaluate_rows
from toolkit.evaluation.outcomes import metrics
from toolkit.modeling.adapters import add_adapter

CLASSES = {"task": "sequence-classification", "finetuning": "full"}


def of_each_row(model, rows):
    """loss and weight (and class) of each row alone, in float64."""
    model = model.double().eval()
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        if isinstance(row["labels"], int):
            found.append((-logits.log_softmax(-1)[row["labels"]].item(), 1, logits.argmax().item()))
            continue
        counted = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        losses = [-logits[t - 1].log_softmax(-1)[row["labels"][t]].item() for t in counted]
        found.append((sum(losses) / max(len(losses), 1), len(losses), None))
    return found


def evaluate(model, rows, task="causal-lm", batch_size=4, collator=None):
    return evaluate_rows(
        model,
        rows,
        Collator(0, task) if collator is None else collator,
        task=task,
        batch_size=batch_size,
        accelerator=Accelerator(cpu=True),
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_language_model_against_fp64(make_model, make_rows, batch_size):
    rows = make_rows(7)
    outcomes = evaluate(make_model(), rows, batch_size=batch_size)
    expected = of_each_row(make_model(), rows)
    assert outcomes.weight.tolist() == [weight for _, weight, _ in expected]
    np.testing.assert_allclose(outcomes.loss, [loss for loss, _, _ in expected], atol=2e-6, rtol=0)
    assert outcomes.loss.dtype == outcomes.weight.dtype == np.float64
    assert outcomes.correct is None


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_classifier_against_fp64(make_encoder, make_rows, batch_size):
    rows = make_rows(9, num_classes=5)
    outcomes = evaluate(make_encoder(), rows, "sequence-classification", batch_size)
    expected = of_each_row(make_encoder(), rows)
    np.testing.assert_allclose(outcomes.loss, [loss for loss, _, _ in expected], atol=2e-6, rtol=0)
    assert outcomes.weight.tolist() == [1.0] * 9
    assert outcomes.expected.tolist() == rows["labels"]
    assert outcomes.predicted.tolist() == [predicted for _, _, predicted in expected]
    assert outcomes.correct.dtype == bool


def test_a_row_without_a_trained_token_weighs_nothing(make_model, make_rows):
    rows = make_rows(3).to_list()
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    data = make_rows(3).from_list(rows)
    for batch_size in (1, 3):
        outcomes = evaluate(make_model(), data, batch_size=batch_size)
        assert outcomes.weight[1] == outcomes.loss[1] == 0
        assert (outcomes.weight[[0, 2]] > 0).all()


def test_rows_joined_into_one_sequence_are_told_apart(make_model, make_rows):
    """As flash attention wants them; a row's first token is predicted by nothing, also where it has a label."""
    rows = make_rows(5).map(lambda row: {"labels": row["input_ids"], "seq_lengths": [row["length"]]})
    joined = Collator(0, packing=True, flatten=True)
    assert joined([rows[0], rows[1]])["input_ids"].shape[0] == 1
    outcomes = evaluate(make_model(), rows, collator=joined, batch_size=3)
    expected = of_each_row(make_model(), rows)
    assert outcomes.weight.tolist() == [length - 1 for length in rows["length"]]
    np.testing.assert_allclose(outcomes.loss, [loss for loss, _, _ in expected], atol=2e-6, rtol=0)


def test_logits_stay_within_their_budget(make_model, make_rows, monkeypatch):
    rows, model, sizes = make_rows(6), make_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel() * 4))
    whole = evaluate(model, rows, batch_size=6)
    assert len(sizes) == 1
    sizes.clear()
    budget = 2 * 4 * 64 * max(rows["length"])
    monkeypatch.setattr(held_out, "LOGITS_BYTES", budget)
    np.testing.assert_allclose(evaluate(model, rows, batch_size=6).loss, whole.loss, atol=2e-6, rtol=0)
    assert len(sizes) == 3
    assert max(sizes) <= budget


def test_a_model_that_always_gives_all_logits(make_rows):
    from transformers import TrOCRConfig, TrOCRForCausalLM

    def model():
        torch.manual_seed(0)
        sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        return TrOCRForCausalLM(TrOCRConfig(vocab_size=64, max_position_embeddings=64, **sizes, **ends))

    assert "logits_to_keep" not in inspect.signature(model().forward).parameters
    rows = make_rows(4)
    expected = [loss for loss, _, _ in of_each_row(model(), rows)]
    np.testing.assert_allclose(evaluate(model(), rows).loss, expected, atol=2e-6, rtol=0)


def test_two_processes_find_what_one_finds(tmp_path, make_model, make_encoder, make_rows):
    program = str(Path(__file__).with_name("held_out_probe.py"))
    command = [sys.executable, program]
    children = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    classes = make_rows(7, num_classes=5)
    for task, alone in (
        ("causal-lm", evaluate(make_model(), make_rows(7), batch_size=3)),
        ("sequence-classification", evaluate(make_encoder(), classes, "sequence-classification", 3)),
    ):
        for rank in range(2):
            with np.load(tmp_path / f"{task}-{rank}.npz") as kept:
                np.testing.assert_allclose(kept["loss"], alone.loss, atol=2e-6, rtol=0)
                assert kept["weight"].tolist() == alone.weight.tolist()
                if alone.expected is not None:
                    assert kept["expected"].tolist() == alone.expected.tolist()
                    assert kept["predicted"].tolist() == alone.predicted.tolist()


def test_metrics_of_other_rows_than_its_own(build, make_encoder, make_rows):
    own, others = make_rows(6, seed=1, num_classes=5), make_rows(8, seed=2, num_classes=5)
    train = make_rows(8, num_classes=5)
    part = build("ann", make_encoder(), adapter=None, rows=train, evaluation=own, **CLASSES)
    part.trainer.start()
    assert part.trainer.evaluate() == metrics(part.trainer.evaluate_rows())
    assert part.trainer.evaluate(others) == metrics(part.trainer.evaluate_rows(others))
    assert part.trainer.evaluate_rows(others).expected.tolist() == others["labels"]
    assert part.trainer.evaluate_rows().expected.tolist() == own["labels"]


def test_a_participant_without_held_out_rows(build, make_model, make_config, make_rows):
    part = build("ann", add_adapter(make_model(), make_config(), name="ann"), adapter="ann")
    part.trainer.start()
    assert part.trainer.evaluate() == {}
    with pytest.raises(DataError, match="ann has no held-out rows"):
        part.trainer.evaluate_rows()
    assert len(part.trainer.evaluate_rows(make_rows(3))) == 3
