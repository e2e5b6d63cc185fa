"""The loop on real trainers: order of training, commits, and what it takes back."""

import json
import shutil
from pathlib import Path

import pytest

from toolkit.rounds.loop import score_of


@pytest.mark.parametrize(
    ("metrics", "metric", "score"),
    [
        ({"loss": 2.0, "accuracy": 0.5}, "auto", 0.5),
        ({"loss": 2.0, "perplexity": 7.4}, "auto", -2.0),
        ({"loss": 2.0, "accuracy": 0.5, "f1": 0.25}, "f1", 0.25),
        ({"loss": 2.0, "accuracy": 0.5}, "loss", -2.0),
        ({"loss": 2.0}, "accuracy", None),
        ({}, "auto", None),
    ],
)
def test_more_of_a_score_is_better(metrics, metric, score):
    assert score_of(metrics, metric) == score


@pytest.fixture
def argv(tiny_encoder, intent_data):
    given = [
        "--model",
        tiny_encoder,
        "--data",
        intent_data,
        "--locales",
        "en-US,fr-FR",
        "--cpu",
        "--no-baselines",
    ]
    given += ["--logging-steps", 1, "--merge-frequency", 1, "--learning-rate", "1e-2", "--warmup-ratio", 0]
    return [str(word) for word in given]


@pytest.fixture
def run(argv, tmp_path, capsys):
    """run("--max-epochs", 3, name="x") → status, error text, folder."""

    def go(*options: object, name: str = "run", batch: int = 24) -> tuple[int, str, Path]:
        from toolkit.cli.train import run_recipe

        folder = tmp_path / name
        words = ["--output-dir", folder, "--batch-size", batch, *options]
        status = run_recipe("iterative-merge", [*argv, *map(str, words)])
        return status, capsys.readouterr().err, folder

    return go


def journal(folder: Path, *events: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in events]


def bits(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*/final_model/*.safetensors"))]


def forget_the_end(folder: Path, event: str, number: int) -> None:
    """Cut the journal behind its ``number``-th record of ``event``: a run that was killed then."""
    path = folder / "journal.jsonl"
    kept, seen = [], 0
    for line in path.read_text().splitlines(keepends=True):
        kept.append(line)
        seen += json.loads(line)["event"] == event
        if seen == number:
            break
    path.write_text("".join(kept))


def test_a_commit_names_what_it_stands_on(run):
    status, errors, folder = run("--max-epochs", 2)
    assert status == 0, errors
    commits = journal(folder, "loop")
    assert [(c["epoch"], c["steps"]) for c in commits] == [
        (1, {"en-US": 1, "fr-FR": 1}),
        (2, {"en-US": 2, "fr-FR": 2}),
    ]
    for number, commit in enumerate(commits, start=1):
        for locale, name in commit["checkpoints"].items():
            assert name == f"checkpoint-{number:08d}-merges-{number}"
            assert (folder / locale / "checkpoints" / name / "manifest.json").is_file()
            assert commit["standings"][locale]["num_merges"] == number
    # In the journal everything comes before what follows from it.
    order = [r["event"] for r in journal(folder, "evaluation", "decision", "merge", "checkpoint", "loop")]
    an_epoch = ["evaluation"] * 2 + ["decision", "merge"] + ["checkpoint"] * 2 + ["loop"]
    assert order == ["evaluation"] * 2 + an_epoch * 2


@pytest.mark.faults
def test_a_damaged_commit_gives_way_to_the_one_before(run):
    status, errors, whole = run("--max-epochs", 3, name="whole")
    assert status == 0, errors
    folder = whole.with_name("damaged")
    shutil.copytree(whole, folder)
    forget_the_end(folder, "loop", 3)
    shutil.rmtree(folder / "en-US" / "final_model")
    newest = folder / "fr-FR" / "checkpoints" / "checkpoint-00000003-merges-3"
    (newest / "adapter_model.safetensors").write_bytes(b"damaged")
    status, errors, _ = run("--max-epochs", 3, "--resume", name="damaged")
    assert status == 0, errors
    assert bits(folder) == bits(whole)
    steps = json.loads((folder / "training_history.json").read_text())["steps"]
    assert [step["step"] for step in steps if step["participant"] == "fr-FR"] == [1, 2, 3]
    assert [r["to"] for r in journal(folder, "rewound")]


@pytest.mark.faults
def test_a_run_whose_commits_are_all_damaged_does_not_begin_again(run):
    status, errors, folder = run("--max-epochs", 1)
    assert status == 0, errors
    forget_the_end(folder, "loop", 1)
    for path in (folder / "fr-FR" / "checkpoints").glob("*/adapter_model.safetensors"):
        path.write_bytes(b"damaged")
    status, errors, _ = run("--max-epochs", 1, "--resume")
    assert status == 1
    assert "has all its checkpoints intact" in errors


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 0, 1, 1, 1, 2]), (2, [1, 2])])
def test_checkpoints_after_a_number_of_steps(run, every, epochs):
    """Of two an epoch: commits in the middle of one change no bit, and those that end with one are not left out."""
    status, errors, whole = run("--max-epochs", 2, name="whole", batch=12)
    assert status == 0, errors
    status, errors, often = run("--max-epochs", 2, "--checkpoint-every", every, name="often", batch=12)
    assert status == 0, errors
    assert bits(often) == bits(whole)
    assert [c["epoch"] for c in journal(often, "loop")] == epochs
