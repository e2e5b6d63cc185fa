"""What iterative merging is compared with: each locale alone."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

LOCALES = ("en-US", "fr-FR", "de-DE")


@pytest.fixture
def run(tiny_encoder, intent_data, tmp_path, capsys):
    def go(*options: object, name: str = "run") -> tuple[int, str, Path]:
        from toolkit.cli.train import run_recipe

        folder = tmp_path / name
        argv = ["--model", tiny_encoder, "--data", intent_data, "--locales", ",".join(LOCALES), "--cpu"]
        argv += ["--batch-size", 24, "--learning-rate", "1e-2", "--max-epochs", 2, "--merge-frequency", 1]
        argv += ["--output-dir", folder, *options]
        before = signal.getsignal(signal.SIGTERM)
        status = run_recipe("iterative-merge", list(map(str, argv)))
        signal.signal(signal.SIGTERM, before)
        return status, capsys.readouterr().err, folder

    return go


def outcomes(folder: Path, arm: str, model: str, rows_of: str) -> dict[str, np.ndarray]:
    with np.load(folder / "comparison" / arm / model / f"{rows_of}.npz") as arrays:
        return dict(arrays)


def test_every_locale_is_trained_alone_and_measured_on_all(run):
    status, errors, folder = run()
    assert status == 0, errors
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    done = [(r["participant"], r["status"]) for r in journal if r["event"] == "baseline"]
    assert done == [(locale, "active") for locale in LOCALES]
    accuracy = {}
    for model in LOCALES:
        for rows_of in LOCALES:
            found = outcomes(folder, "own_training", model, rows_of)
            accuracy[model, rows_of] = float(np.mean(found["expected"] == found["predicted"]))
            base = outcomes(folder, "base", rows_of, rows_of)
            assert found["expected"].tolist() == base["expected"].tolist()
    compared = json.loads((folder / "final_statistics.json").read_text())["comparison"]["participants"]
    for locale in LOCALES:
        arms = compared[locale]["arms"]
        assert arms["own_training"]["value"] == accuracy[locale, locale]
        others = {other: accuracy[other, locale] for other in LOCALES if other != locale}
        assert arms["best_source"]["value"] == max(others.values())
        assert accuracy[compared[locale]["best_source"], locale] == max(others.values())
    # Their checkpoints and adapters go when they are done; their steps are no participants' steps.
    assert not [path for path in (folder / "baselines").rglob("*") if path.is_file()]
    steps = json.loads((folder / "training_history.json").read_text())["steps"]
    assert {step["participant"] for step in steps} == set(LOCALES)


def test_without_baselines_nothing_of_them_is_there(run):
    status, errors, folder = run("--no-baselines")
    assert status == 0, errors
    assert not (folder / "baselines").exists()
    assert not (folder / "comparison" / "own_training").exists()
    assert (folder / "comparison" / "iterative" / "de-DE" / "de-DE.npz").is_file()
