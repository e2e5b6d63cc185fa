"""One locale that fails, all that fail, data that are wrong, signals: what stops and what goes on."""

import json
import os
import shutil
import signal

import pytest
from torch.nn.modules.module import register_module_forward_hook

THREE = ("--locales", "en-US,fr-FR,de-DE", "--weight-calculation", "average")


def nan(output) -> None:
    output.logits = output.logits * float("nan")


def fail(output) -> None:
    raise RuntimeError("the worker is gone")


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (nan, "NonFiniteLossError: "),
        pytest.param(fail, "RuntimeError: the worker is gone", marks=pytest.mark.slow),
    ],
)
def test_a_locale_that_fails_is_left_behind(iterate, tmp_path, poisoned_data, poison, effect, words):
    poison(effect)
    run = iterate(tmp_path / "run", *THREE, "--data", poisoned_data, "--baselines")
    assert run.status == 0, run.err
    (failure,) = [f for f in run.events("participant_failed") if not f["participant"].startswith("baselines")]
    assert (failure["participant"], failure["recovered"]) == ("fr-FR", False)
    assert words in failure["error"]
    assert [merge["participants"] for merge in run.merges] == [["en-US", "de-DE"]] * 2
    assert run.read("state_summary.json")["participants"]["fr-FR"]["status"] == "failed"
    assert words in run.read("state_summary.json")["participants"]["fr-FR"]["reason"]
    statistics = run.read("final_statistics.json")
    assert statistics["participants"]["fr-FR"]["status"] == "failed"
    assert statistics["participants"]["en-US"]["status"] == "done"
    assert statistics["alerts"]["participant_failed"] >= 1
    assert {"en-US", "de-DE"} <= statistics["verdicts"].keys()
    assert "fr-FR failed at step" in run.out
    assert not (run.folder / "fr-FR" / "final_model").exists()
    # The others are those that they would be without it.
    without = iterate(tmp_path / "without", "--locales", "en-US,de-DE", *THREE[2:], "--data", poisoned_data)
    assert without.weights == run.weights


def test_a_locale_that_fails_later_was_part_of_the_first_merge(iterate, tmp_path, poisoned_data, poison):
    poison(fail, times=(2,))
    run = iterate(tmp_path / "run", *THREE, "--data", poisoned_data)
    assert run.status == 0, run.err
    assert [merge["participants"] for merge in run.merges] == [
        ["en-US", "fr-FR", "de-DE"],
        ["en-US", "de-DE"],
    ]
    rounds = run.read("training_history.json")["rounds"]
    assert [list(r["failed"]) for r in rounds] == [[], ["fr-FR"]]


@pytest.mark.slow
def test_auto_recovery_takes_a_locale_back_to_its_checkpoint_once(iterate, tmp_path, poisoned_data, poison):
    intact = iterate(tmp_path / "intact", *THREE, "--data", poisoned_data)
    poison(fail, times=(2,))
    run = iterate(tmp_path / "run", *THREE, "--data", poisoned_data, "--enable-auto-recovery")
    assert run.status == 0, run.err
    (failure,) = run.events("participant_failed")
    assert failure["recovered"]
    assert "goes on from its last checkpoint (step 3)" in run.out
    assert run.weights == intact.weights
    poison(fail, times=(2, 3))
    run = iterate(tmp_path / "twice", *THREE, "--data", poisoned_data, "--enable-auto-recovery")
    assert run.status == 0, run.err
    assert [failure["recovered"] for failure in run.events("participant_failed")] == [True, False]


def test_all_failed_is_a_failed_run(iterate, tmp_path, poisoned_data, poison):
    poison(fail)
    run = iterate(tmp_path / "run", "--locales", "fr-FR", "--data", poisoned_data)
    assert run.status == 1
    assert "every participant has failed:\n  fr-FR: RuntimeError: the worker is gone" in run.err
    assert run.read("final_statistics.json")["status"] == "failed"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text('{"id": "1", "locale": "fr-FR", "utt": "red"}\n'), "fr-FR"),
        (lambda path: path.write_text("no json\n"), "fr-FR"),
    ],
    ids=["no label", "no json"],
)
def test_bad_data_of_one_locale_end_the_run_before_it_begins(iterate, tmp_path, intent_data, damage, words):
    folder = tmp_path / "data"
    shutil.copytree(intent_data, folder)
    damage(folder / "fr-FR" / "train.jsonl")
    run = iterate(tmp_path / "run", "--data", f"{folder}/{{locale}}")
    assert run.status == 2
    assert words in run.err


def test_a_locale_without_rows_is_named(iterate, tmp_path):
    run = iterate(tmp_path / "run", "--locales", "en-US,it-IT")
    assert run.status == 2
    assert "it-IT" in run.err


@pytest.fixture
def stop_at():
    """stop_at(n): the n-th training step of a classifier sends SIGTERM to this process."""
    handles = []
    before = signal.getsignal(signal.SIGTERM)

    def set_up(number: int) -> None:
        seen = []

        def hook(module, arguments, output) -> None:
            if type(module).__name__ == "XLMRobertaForSequenceClassification" and module.training:
                seen.append(1)
                if len(seen) == number:
                    os.kill(os.getpid(), signal.SIGTERM)

        handles.append(register_module_forward_hook(hook))

    yield set_up
    for handle in handles:
        handle.remove()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "step",
    [pytest.param(3, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow), 10],
    ids=["in an epoch", "after a merge", "in a baseline"],
)
def test_an_interrupted_run_goes_on(iterate, iterated, tmp_path, stop_at, step):
    """Of 8 steps with merges (2 locales, 2 epochs, 2 steps), then 8 without."""
    options = ("--baselines", "--lora-dropout", 0.1)
    whole = iterated(*options)
    stop_at(step)
    run = iterate(tmp_path / "run", *options)
    assert run.status == 75
    assert "continue with: meldkit train iterative-merge" in run.err
    assert run.read("state_summary.json")["status"] == "interrupted"
    again = iterate(tmp_path / "run", *options, "--resume")
    assert again.status == 0, again.err
    assert again.weights == whole.weights
    for locale in ("en-US", "fr-FR"):
        assert again.losses(locale) == whole.losses(locale)
    assert [m["epoch"] for m in again.merges] == [1, 2]

    def figures(result) -> str:
        return json.dumps(result.read("final_statistics.json")["comparison"])

    assert figures(again) == figures(whole)
    assert "nothing is left to do" in iterate(tmp_path / "run", *options, "--resume").out
