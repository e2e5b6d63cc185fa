"""Small models on disk, and the command line in this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from toolkit.cli.main import main


def write_model(folder: Path, tensors: dict[str, np.ndarray], config: dict) -> Path:
    """A model folder of any tensors and configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def trio(tiny_model: Path, tmp_path_factory) -> dict[str, Path]:
    """Three fine-tuned copies "a", "b", "c" of tiny-llama, float32, tied."""
    root = tmp_path_factory.mktemp("trio")
    weights = load_file(tiny_model / "model.safetensors")
    folders = {}
    for seed, name in enumerate("abc"):
        folders[name] = root / name
        shutil.copytree(
            tiny_model, folders[name], ignore=shutil.ignore_patterns("manifest.json", "model.safetensors")
        )
        generator = np.random.default_rng(seed)
        moved = {n: (t + generator.normal(0, 0.05, t.shape)).astype(np.float32) for n, t in weights.items()}
        save_file(moved, folders[name] / "model.safetensors", {"format": "pt"})
    return folders


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str, name: str = "merge.yml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def run_merge(capsys) -> Callable[..., tuple[int, str, str]]:
    """meldkit merge in this process: exit status, standard output, standard error without progress."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["merge", *map(str, words)])
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines(keepends=True) if not line.startswith("merging: ")]
        return status, captured.out, "".join(errors)

    return run


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """A folder of given tensors: make_model("a", {"x": array}, num_hidden_layers=2)."""

    def make(name: str, tensors: dict[str, np.ndarray], **config: object) -> Path:
        return write_model(tmp_path / name, tensors, {"architectures": ["ToyForCausalLM"], **config})

    return make
