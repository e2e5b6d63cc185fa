"""Help, dry runs and wrong input answer at once: nothing heavy is imported on the way."""

import pytest

RECIPE = ["train", "centralized-hf"]
ITERATIVE = ["train", "iterative-merge"]


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["trian"], 2),
        (["train", "--help"], 0),
        (["train", "centralised-hf"], 2),
        ([*RECIPE, "--help"], 0),
        ([*RECIPE, "--config", "centralized-hf", "--print-config"], 0),
        ([*RECIPE, "--model", "m", "--data", "org/name", "--output-dir", "o", "--dry-run"], 0),
        ([*RECIPE, "--learnin-rate", "3"], 2),
        ([*RECIPE, "--config", "nowhere.yaml"], 2),
        ([*RECIPE, "--trainer-args", "neftune_alpha=5"], 2),
        (RECIPE, 2),  # the guide's files are not there
        ([*ITERATIVE, "--help"], 0),
        ([*ITERATIVE, "--print-config"], 0),
        ([*ITERATIVE, "--locales", "en-US,fr-FR", "--gate-tolerance", "1"], 2),
        ([*ITERATIVE, "--locales", "en-US,am-ET", "--weight-calculation", "average", "--dry-run"], 2),
        ([*ITERATIVE, "--locales", "en-US,fr-FR", "--weight-calculation", "average", "--dry-run"], 0),
        (["data", "--help"], 0),
        (["data", "check", "--help"], 0),
        (["data", "preview", "--help"], 0),
        (["data", "split", "--help"], 0),
        (["data", "samples", "--help"], 0),
        (["completion", "--help"], 0),
        (["completion", "bash"], 0),
        (["models", "--help"], 0),
        (["merge"], 2),
        (["merge", "--help"], 0),
        (["merge", "recipe.yml"], 2),
        (["merge", "recipe.yml", "out", "--verbos"], 2),
        (["fisher", "--help"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_nothing_heavy_is_imported(heavy_imports, argv, status):
    assert heavy_imports(argv) == (status, [])


@pytest.mark.parametrize("flags", [[], ["--merge-algorithm", "ties"]])
def test_similarities_and_methods_are_looked_up_with_numpy_alone(heavy_imports, flags):
    assert heavy_imports([*ITERATIVE, "--locales", "en-US,fr-FR", *flags, "--dry-run"]) == (0, ["numpy"])


def test_the_probe_sees_an_import(heavy_imports, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import numpy")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert heavy_imports(["--version"]) == (0, ["numpy"])
