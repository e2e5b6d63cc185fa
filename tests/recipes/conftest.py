"""Run a recipe inside the test's process, as the command line would."""

import contextlib
import gc
import io
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def defaults_file(folder: Path, tiny_model: Path, chat_data: dict[str, Path]) -> Path:
    values = {
        "model": str(tiny_model),
        "data": str(chat_data["train"]),
        "eval_data": str(chat_data["valid"]),
        "max_length": 160,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "mixed_precision": "no",  # the same on every CPU
    }
    path = folder / "defaults.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def train(tmp_path, tiny_model, chat_data, capsys):
    """train("--max-steps", 2, …) → status, output, error text and the run directory."""

    def run(*options: object, defaults: bool = True, output_dir: Path | None = None) -> SimpleNamespace:
        from toolkit.cli.train import run_recipe

        output_dir = output_dir or tmp_path / "run"
        argv: list[object] = ["--output-dir", output_dir, "--cpu"]
        if defaults:  # in a file, so that a test's flags win over them
            argv += ["--config", defaults_file(tmp_path, tiny_model, chat_data)]
        capsys.readouterr()
        status = run_recipe("centralized-hf", [str(a) for a in [*argv, *options]])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err, folder=output_dir)

    return run


@pytest.fixture
def history():
    def read(folder: Path) -> dict:
        return json.loads((folder / "training_history.json").read_text())

    return read


@dataclass(frozen=True)
class IterativeRun:
    """A run of the iterative recipe, and what it left."""

    status: int
    out: str
    err: str
    folder: Path

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text())

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "journal.jsonl").read_text().splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    @cached_property
    def merges(self) -> list[dict[str, Any]]:
        return self.read("merge_history.json")["merges"]

    @property
    def merge_epochs(self) -> list[int]:
        return [merge["epoch"] for merge in self.merges if merge["status"] == "merged"]

    @property
    def mixtures(self) -> list[dict[str, dict[str, float]]]:
        """Of every merge: target to source to weight."""
        return [merge["weights"] for merge in self.merges]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.read("training_history.json")["steps"]

    def losses(self, locale: str) -> list[float]:
        return [step["loss"] for step in self.steps if step["participant"] == locale]

    def tensors(self, locale: str, folder: str = "final_model") -> dict[str, Any]:
        return load_tensors(self.folder / locale / folder)

    @property
    def weights(self) -> dict[str, list[Any]]:
        """Trained values of every locale, as lists: ``==`` compares their bits."""
        return {
            path.parents[1].name: {name: t.tolist() for name, t in load_tensors(path.parent).items()}
            for path in sorted(self.folder.glob("*/final_model/*.safetensors"))
        }


def load_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="session")
def iterative_defaults(tmp_path_factory, tiny_encoder, intent_data) -> dict[str, Any]:
    """Two locales, two epochs of two steps, a merge after each; no baselines."""
    return {
        "model": str(tiny_encoder),
        "data": str(intent_data),
        "locales": ["en-US", "fr-FR"],
        "max_epochs": 2,
        "merge_frequency": 1,
        "batch_size": 12,
        "learning_rate": 1e-2,
        "warmup_ratio": 0,
        "max_length": 64,
        "logging_steps": 1,
        "report_to": [],
        "baselines": False,
    }


@pytest.fixture(scope="session")
def iterate(tmp_path_factory, iterative_defaults):
    """iterate(folder, "--merge-scope", "each") → the iterative recipe's run in that folder."""
    config = tmp_path_factory.mktemp("iterative") / "defaults.json"
    config.write_text(json.dumps(iterative_defaults))

    def run(folder: Path, *options: object, defaults: bool = True) -> IterativeRun:
        from toolkit.cli.train import run_recipe

        argv: list[object] = ["--output-dir", folder, "--cpu"]
        argv += ["--config", config] if defaults else []
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run_recipe("iterative-merge", [str(a) for a in [*argv, *options]])
        if not gc.get_freeze_count():  # the end of a trainer collects garbage, and what was imported is none
            gc.freeze()
        return IterativeRun(status, out.getvalue(), err.getvalue(), folder)

    return run


@pytest.fixture(scope="session")
def iterated(tmp_path_factory, iterate):
    """iterated("--merge-scope", "each") → a finished run with these options; the same options run once a session."""
    known: dict[tuple[str, ...], IterativeRun] = {}

    def run(*options: object) -> IterativeRun:
        key = tuple(str(option) for option in options)
        if key not in known:
            known[key] = iterate(tmp_path_factory.mktemp("iterated") / "run", *key)
            assert known[key].status == 0, known[key].err
        return known[key]

    return run


@pytest.fixture(scope="session")
def contrary_data(tmp_path_factory) -> Path:
    """Two locales that contradict each other: the same two words, and opposite classes. A few full epochs learn it."""
    folder = tmp_path_factory.mktemp("contrary")
    for number, locale in enumerate(("en-US", "fr-FR")):
        (folder / locale).mkdir()
        for split, count in (("train", 24), ("validation", 8)):
            rows = [
                {
                    "locale": locale,
                    "utt": f"{('red', 'blue')[i % 2]} " * 4 + f"{split} {i}",
                    "intent": f"intent_{(i + number) % 2}",
                }
                for i in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / locale / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="session")
def contrary(contrary_data) -> tuple[object, ...]:
    """Options with which each of two contrary locales has learned its own classes after four epochs."""
    return (
        "--data",
        contrary_data,
        "--finetuning",
        "full",
        "--learning-rate",
        "3e-3",
        "--lr-scheduler",
        "constant",
    )


POISON = "moon moon moon star"


@pytest.fixture
def poisoned_data(tmp_path, intent_data) -> Path:
    """The intents with one more row in fr-FR: see ``poison``."""
    folder = tmp_path / "poisoned"
    shutil.copytree(intent_data, folder)
    row = {"id": "p", "locale": "fr-FR", "utt": POISON, "intent": "intent_0"}
    with open(folder / "fr-FR" / "train.jsonl", "a") as stream:
        stream.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def poison(tiny_encoder):
    """poison(effect, times) → training batches with the poisoned row go through ``effect``, at those visits only.

    ``effect`` gets the classifier's output; it may change it or raise. Torch itself calls it.
    """
    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from transformers import AutoTokenizer

    handles = []
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny_encoder)(POISON).input_ids)

    def set_up(effect, times=range(1, 10**6)) -> None:
        visits = []

        def hook(module, arguments, keywords, output):
            if type(module).__name__ != "XLMRobertaForSequenceClassification" or not module.training:
                return
            if bool((keywords["input_ids"][:, : len(ids)] == ids).all(1).any()):
                visits.append(1)
                if len(visits) in times:
                    effect(output)

        handles.append(register_module_forward_hook(hook, with_kwargs=True))

    yield set_up
    for handle in handles:
        handle.remove()
