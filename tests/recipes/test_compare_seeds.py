"""Runs that differ in their seed, in one table."""

import json

import pytest

from toolkit.cli.main import main


@pytest.fixture(scope="module")
def runs(iterate, tmp_path_factory):
    """Folders of finished runs of seeds 1 and 2, with baselines."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("seeds") / f"seed{seed}"
        options = ("--seed", seed, "--baselines", "--bootstrap-samples", 200)
        assert iterate(folder, *options).status == 0
        folders.append(folder)
    return folders


def statistics(folder):
    return json.loads((folder / "final_statistics.json").read_text())["comparison"]["participants"]


def test_the_arms_are_means_over_the_seeds(runs, tmp_path, capsys):
    out = tmp_path / "seeds.json"
    assert main(["compare-seeds", *map(str, runs), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "rows and of 2 seeds" in printed
    assert "one seed" not in printed
    found = json.loads(out.read_text())
    assert found["seeds"] == [1, 2]
    of_runs = [statistics(folder) for folder in runs]
    for locale in ("en-US", "fr-FR"):
        for arm in ("base", "own_training", "last_merge", "best_source", "iterative"):
            values = [of_run[locale]["arms"][arm]["value"] for of_run in of_runs]
            pooled = found["participants"][locale]["arms"][arm]
            assert pooled["by_seed"] == values
            assert pooled["value"] == pytest.approx(sum(values) / 2, abs=1e-12)
    assert found["participants"]["fr-FR"]["best_source"] == "en-US"


def test_the_flags_reach_the_comparison(runs, tmp_path):
    out = tmp_path / "seeds.json"
    words = ["compare-seeds", "--runs", ",".join(map(str, runs)), "--out", str(out)]
    assert main([*words, "--metric", "loss", "--bootstrap-samples", "150", "--seed", "7"]) == 0
    found = json.loads(out.read_text())
    assert [found[name] for name in ("metric", "num_bootstrap_samples", "bootstrap_seed")] == ["loss", 150, 7]


def test_wrong_runs(runs, iterate, tmp_path, capsys):
    other = tmp_path / "other"
    assert iterate(other, "--seed", 3, "--batch-size", 6, "--max-epochs", 1).status == 0
    lacks = tmp_path / "lacks"
    lacks.mkdir()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    lines = (runs[0] / "journal.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "journal.jsonl").write_text("".join(lines[:-1]))
    capsys.readouterr()
    for folders, words in (
        ([runs[0]], "runs"),
        ([runs[0], lacks], "holds no run"),
        ([runs[0], unfinished], "is not finished"),
        ([runs[0], runs[0]], "same seed"),
        ([runs[0], other], "batch_size: 12 and 6"),
    ):
        assert main(["compare-seeds", *map(str, folders)]) == 2
        assert words in capsys.readouterr().err


def test_help(capsys):
    assert main(["compare-seeds", "--help"]) == 0
    assert "--bootstrap-samples" in capsys.readouterr().out
