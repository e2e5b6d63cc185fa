"""The recipe end to end on a tiny model: what it writes, and that every option reaches the training."""

import csv
import json

import pytest
import torch

FILES = [
    "environment.json",
    "experiment_config.json",
    "final_model/README.md",
    "final_model/adapter_config.json",
    "final_model/adapter_model.safetensors",
    "final_model/chat_template.jinja",
    "final_model/tokenizer.json",
    "journal.jsonl",
    "report.html",
    "training.log",
    "training_history.json",
    "training_metrics.json",
]


def events(folder) -> list[str]:
    return [json.loads(line)["event"] for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_everything_that_a_run_leaves(train, history):
    run = train("--max-epochs", 2, "--sample-prompts", "train 1 red")
    assert run.status == 0, run.err
    missing = [name for name in FILES if not (run.folder / name).is_file()]
    assert not missing
    assert list((run.folder / "model" / "logs").glob("events.out.tfevents.*"))
    recorded = history(run.folder)
    assert [row["step"] for row in recorded["steps"]] == list(range(1, 13))
    assert recorded["steps"][-1]["loss"] < recorded["steps"][0]["loss"]
    assert [(e["step"], e["phase"]) for e in recorded["evaluations"]] == [
        (0, "before"),
        (6, "during"),
        (12, "after"),
    ]
    before, _, after = (e["metrics"]["loss"] for e in recorded["evaluations"])
    assert after < before
    assert events(run.folder)[0:2] == ["created", "started"]
    assert events(run.folder)[-1] == "finished"
    assert events(run.folder).count("checkpoint") == 2
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["num_processes"] == 1
    assert environment["plan"]["device"] == "cpu"
    for text in (
        "Training samples",
        "24",
        "Effective batch size",
        "Model saved to",
        "eval_loss",
        "train 1 red",
    ):
        assert text in run.out
    assert "Held-out loss" in run.out


def test_the_adapter_that_was_saved_is_the_one_that_was_measured(train, history, tiny_model, chat_data):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train("--max-steps", 4, "--merge-final")
    assert run.status == 0, run.err
    final = run.folder / "final_model"
    tokenizer = AutoTokenizer.from_pretrained(final)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, final).eval()
    merged = AutoModelForCausalLM.from_pretrained(final / "merged", dtype=torch.float32).eval()
    loss_sum, count = 0.0, 0
    for line in chat_data["valid"].read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        ids = torch.tensor(
            [
                tokenizer(
                    prompt + messages[1]["content"] + tokenizer.eos_token, add_special_tokens=False
                ).input_ids
            ]
        )
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logits = adapted(input_ids=ids).logits
            assert torch.allclose(logits, merged(input_ids=ids).logits, atol=1e-4)
        log_p = logits.double().log_softmax(-1)
        for t in range(start, ids.shape[1]):
            loss_sum -= log_p[0, t - 1, ids[0, t]].item()
            count += 1
    measured = history(run.folder)["evaluations"][-1]["metrics"]
    assert measured["num_tokens"] == count
    assert measured["loss"] == pytest.approx(loss_sum / count, abs=1e-5)


def test_resume_of_a_finished_run_does_nothing(train):
    assert train("--max-steps", 1).status == 0
    again = train("--max-steps", 1, "--resume")
    assert again.status == 0
    assert "nothing is left to do" in again.out


def test_the_saved_configuration_reproduces_the_run(train, tmp_path, history):
    first = train("--max-steps", 3)
    config = first.folder / "experiment_config.json"
    second = train("--config", config, defaults=False, output_dir=tmp_path / "again")
    assert second.status == 0, second.err
    for name in ("loss", "batch_digest", "grad_norm"):
        assert [s[name] for s in history(first.folder)["steps"]] == [
            s[name] for s in history(second.folder)["steps"]
        ]


def losses(run, history) -> list[float]:
    assert run.status == 0, run.err
    return [row["loss"] for row in history(run.folder)["steps"]]


CHANGES = [
    ("--learning-rate", "2e-2"),
    ("--lora-r", 8),
    ("--lora-alpha", 64),
    ("--lora-dropout", 0.3),
    ("--lora-target-modules", "q_proj"),
    ("--lora-modules-to-save", "lm_head"),
    ("--finetuning", "full", "--lora-r", 16),
    ("--use-rslora",),
    ("--use-dora", "--seed", 42),
    ("--load-in-4bit",),
    ("--load-in-8bit",),
    ("--dtype", "bfloat16"),
    ("--loss-on", "all"),
    ("--max-rows", 9),
    ("--packing",),
    ("--length-grouping",),
    ("--batch-size", 2),
    ("--gradient-accumulation-steps", 2),
    ("--lr-scheduler", "constant"),
    ("--warmup-ratio", 0.5),
    ("--weight-decay", 0.9),
    ("--max-grad-norm", 0.01),
    ("--optim", "sgd"),
    ("--seed", 1),
    ("--trainer-args", "neftune_noise_alpha=5"),
]


@pytest.fixture(scope="module")
def reference_losses():
    return {}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: " ".join(map(str, c)))
def test_every_option_changes_the_training(train, history, tmp_path, reference_losses, change):
    """Three steps with the option against three steps without it; two of them can only be told by the third loss."""
    if not reference_losses:
        reference_losses["plain"] = losses(train("--max-steps", 3, output_dir=tmp_path / "plain"), history)
        again = losses(train("--max-steps", 3, output_dir=tmp_path / "again"), history)
        assert again == reference_losses["plain"]
    changed = losses(train("--max-steps", 3, *change), history)
    assert len(changed) == 3
    assert changed != reference_losses["plain"]


def test_gradient_checkpointing_changes_memory_only(train, history, tmp_path):
    on = losses(train("--max-steps", 2, "--gradient-checkpointing"), history)
    off = losses(train("--max-steps", 2, "--no-gradient-checkpointing", output_dir=tmp_path / "off"), history)
    assert on == pytest.approx(off, abs=1e-6)


def test_evaluation_and_checkpoint_periods(train, history):
    run = train("--max-steps", 6, "--eval-every", 2, "--checkpoint-every", 1, "--keep-checkpoints", 3)
    assert run.status == 0, run.err
    assert [e["step"] for e in history(run.folder)["evaluations"]] == [0, 2, 4, 6]
    assert events(run.folder).count("checkpoint") == 6
    kept = sorted(p.name for p in (run.folder / "model" / "checkpoints").iterdir())
    assert kept == ["checkpoint-00000004", "checkpoint-00000005", "checkpoint-00000006"]


def test_never(train, history):
    run = train("--max-steps", 3, "--eval-every", "never", "--checkpoint-every", "never")
    assert [e["phase"] for e in history(run.folder)["evaluations"]] == ["before", "after"]
    assert events(run.folder).count("checkpoint") == 1


def test_held_out_share_of_the_training_data(train, tiny_model, chat_data, history):
    options = [
        "--model",
        tiny_model,
        "--data",
        chat_data["train"],
        "--max-length",
        160,
        "--eval-fraction",
        0.25,
    ]
    run = train(*options, "--max-steps", 1, defaults=False)
    assert run.status == 0, run.err
    assert "Validation samples" in run.out
    assert history(run.folder)["evaluations"]


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_classification(train, tmp_path, history, finetuning):
    """An encoder learns two classes that words give away; the saved model predicts what was measured."""
    from toolkit.modeling.samples import make

    model = make("tiny-xlm-r", tmp_path / "encoder")
    with open(tmp_path / "rows.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for i in range(48):
            kind = i % 2
            writer.writerow(
                [
                    f"{'turn on the lamp' if kind else 'what is the weather'} number {i}",
                    ["weather", "light"][kind],
                ]
            )
    options = ["--task", "sequence-classification", "--finetuning", finetuning, "--max-length", 64]
    options += [
        "--eval-fraction",
        0.25,
        "--max-epochs",
        6,
        "--batch-size",
        6,
        "--gradient-accumulation-steps",
        1,
    ]
    run = train(
        "--model", model, "--data", tmp_path / "rows.csv", *options, "--learning-rate", "5e-3", defaults=False
    )
    assert run.status == 0, run.err
    evaluations = history(run.folder)["evaluations"]
    assert evaluations[-1]["metrics"]["accuracy"] > 0.9
    assert set(evaluations[-1]["metrics"]) == {"loss", "accuracy", "f1"}
    if finetuning == "full":
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        classifier = AutoModelForSequenceClassification.from_pretrained(run.folder / "final_model").eval()
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "final_model")
        with torch.no_grad():
            logits = classifier(**tokenizer("turn on the lamp number 3", return_tensors="pt")).logits
        assert classifier.config.id2label[int(logits.argmax())] == "light"


def classification_rows(folder, number=40):
    path = folder / "rows.csv"
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for i in range(number):
            words = ["what is the weather", "turn on the lamp", "play some jazz in the kitchen now"][i % 3]
            writer.writerow([f"{words} number {i}", ["weather", "light", "music"][i % 3]])
    return path


def test_classification_accumulation_equals_a_larger_batch(train, tmp_path, history):
    from toolkit.modeling.samples import make

    model = make("tiny-xlm-r", tmp_path / "encoder")
    settings = json.loads((model / "config.json").read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    (model / "config.json").write_text(json.dumps(settings | off))
    curves = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        options = [
            "--task",
            "sequence-classification",
            "--max-length",
            64,
            "--max-steps",
            4,
            "--learning-rate",
            "5e-3",
        ]
        options += ["--batch-size", batch_size, "--gradient-accumulation-steps", accumulation]
        data = classification_rows(tmp_path)
        run = train(
            "--model",
            model,
            "--data",
            data,
            *options,
            defaults=False,
            output_dir=tmp_path / f"run{batch_size}",
        )
        curves.append(losses(run, history))
    assert curves[0][0] < 2.0
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[2] == pytest.approx(curves[0], abs=1e-4)


@pytest.mark.parametrize("quantization", ["--load-in-4bit", "--load-in-8bit"])
def test_classification_on_a_quantized_base(train, tmp_path, history, quantization):
    from toolkit.modeling.samples import make

    model = make("tiny-xlm-r", tmp_path / "encoder")
    options = ["--task", "sequence-classification", "--max-length", 64, "--max-steps", 2, quantization]
    run = train("--model", model, "--data", classification_rows(tmp_path), *options, defaults=False)
    assert len(losses(run, history)) == 2


def test_an_adapter_of_a_classifier_knows_its_classes(train, tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from toolkit.modeling.samples import make

    model = make("tiny-xlm-r", tmp_path / "encoder")
    options = ["--task", "sequence-classification", "--max-length", 64, "--max-steps", 1]
    run = train("--model", model, "--data", classification_rows(tmp_path), *options, defaults=False)
    assert run.status == 0, run.err
    final = run.folder / "final_model"
    base = AutoModelForSequenceClassification.from_pretrained(model, config=AutoConfig.from_pretrained(final))
    loaded = PeftModel.from_pretrained(base, final)
    assert set(loaded.config.id2label.values()) == {"light", "music", "weather"}


def test_sample_prompts_and_their_length(train, tmp_path, history):
    """Enough steps that the tiny model says something."""
    answers = {}
    for name, options in {
        "plain": (),
        "short": ("--sample-tokens", 2),
    }.items():
        options = ("--max-steps", 40, "--max-epochs", 10, "--eval-every", "never", *options)
        run = train("--sample-prompts", "red rose", *options, output_dir=tmp_path / name)
        samples = history(run.folder)["samples"]
        assert [s["phase"] for s in samples] == ["before", "after"]
        answers[name] = samples[1]["answer"]
    assert answers["plain"].startswith(answers["short"])
    assert len(answers["short"]) < len(answers["plain"])


def test_the_system_prompt_comes_before_a_sample_prompt(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolkit.evaluation.answers import answer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    seen: list[str] = []
    model.register_forward_pre_hook(
        lambda _, __, keywords: seen.append(tokenizer.decode(keywords["input_ids"][0])), with_kwargs=True
    )
    for system_prompt in (None, "you answer in rhymes"):
        answer(model, tokenizer, "red rose", system_prompt=system_prompt, num_tokens=1, device="cpu")
    assert ["rhymes" in text for text in seen] == [False, True]
    for text in seen:
        assert "red rose" in text
        assert text.rstrip().endswith("<|im_start|>assistant")


def test_dataloader_workers_give_the_same_run(train, tmp_path, history):
    plain = losses(train("--max-steps", 2, output_dir=tmp_path / "plain"), history)
    workers = losses(
        train("--max-steps", 2, "--dataloader-workers", 1, output_dir=tmp_path / "workers"), history
    )
    assert workers == plain
