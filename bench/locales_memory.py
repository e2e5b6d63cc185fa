"""Memory of eight LoRA locales on one base against one.

    python bench/locales_memory.py [--encoder FOLDER] [--language-model FOLDER] [--out FILE]

Each arm is a process of its own that builds its locales as the recipes do, trains them in turns, evaluates them, takes
all their states and optimizer states, merges them and hands the result out, for two rounds of two steps. Read from
/proc/self/status every ten milliseconds: the peak of the resident memory (VmRSS) and of its anonymous part (RssAnon:
heaps and tensors, without files that are mapped), of the whole process and from the first step on (loading the
tokenizer and the base has a peak of its own). Arms alternate 1 8 8 1; medians and their ratios are reported. Rows have
random tokens and fixed lengths, so that all locales need the same.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUM_LOCALES = 8
NUM_ROUNDS = 2
STEPS_A_ROUND = 2
SAMPLE_SECONDS = 0.01
LOCALES = ("de-DE", "en-US", "es-ES", "fi-FI", "fr-FR", "hu-HU", "ja-JP", "sw-KE")
SHAPES = {"sequence-classification": (16, 24), "causal-lm": (2, 64)}
"""Rows of a batch and tokens of a row."""
NUM_CLASSES = 60


class Peaks(threading.Thread):
    """Samples this process's resident memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mebibytes = {"VmRSS": 0.0, "RssAnon": 0.0}

    def run(self) -> None:
        while True:
            self.sample()
            time.sleep(SAMPLE_SECONDS)

    def take(self) -> dict[str, float]:
        """The peaks since the last call, in MiB."""
        self.sample()
        taken, self.mebibytes = self.mebibytes, dict.fromkeys(self.mebibytes, 0.0)
        return taken

    def sample(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.mebibytes:
                self.mebibytes[name] = max(self.mebibytes[name], int(value.split()[0]) / 1024)


def rows(task: str, number: int, seed: int) -> Any:
    import datasets
    import torch

    num_tokens = SHAPES[task][1]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 1000, (number, num_tokens), generator=generator).tolist()
    classes = torch.randint(0, NUM_CLASSES, (number,), generator=generator).tolist()
    labels = ids if task == "causal-lm" else classes
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [num_tokens] * number})


def factory_of(model: str, task: str, folder: Path) -> Any:
    from accelerate import PartialState

    from toolkit.config.recipes import CentralizedConfig
    from toolkit.data.tokenizer import load_tokenizer
    from toolkit.launch.plan import resolve_plan
    from toolkit.rounds.participants import TrainerFactory
    from toolkit.training.world import prepare_world

    config = CentralizedConfig.model_validate(
        {
            "model": model,
            "data": "rows",
            "output_dir": folder,
            "task": task,
            "cpu": True,
            "max_length": SHAPES[task][1],
            "batch_size": SHAPES[task][0],
            "eval_batch_size": SHAPES[task][0],
            "gradient_accumulation_steps": 1,
            "max_epochs": NUM_ROUNDS,
        }
    )
    plan = resolve_plan(config)
    prepare_world(plan)
    labels = [f"class {n}" for n in range(NUM_CLASSES)] if task == "sequence-classification" else None
    return TrainerFactory(config, plan, load_tokenizer(config), labels, PartialState())


def train(model: str, task: str, num_locales: int) -> dict[str, Any]:
    peaks = Peaks()
    peaks.start()
    with tempfile.TemporaryDirectory() as folder:
        factory = factory_of(model, task, Path(folder))
        trainers = []
        for number, name in enumerate(LOCALES[:num_locales]):
            prepared: Any = SimpleNamespace(
                train=rows(task, STEPS_A_ROUND * SHAPES[task][0], number),
                evaluation=rows(task, SHAPES[task][0], 100),
            )
            trainers.append(
                factory.build(
                    name,
                    prepared,
                    Path(folder) / name,
                    on_step=lambda step: None,
                    stop_requested=lambda: False,
                )
            )
        phases = {"building": peaks.take()}
        for trainer in trainers:
            trainer.start()
        for number in range(1, NUM_ROUNDS + 1):
            one_round(trainers, number)
        phases["training"] = peaks.take()
    phases["whole"] = {kind: max(phase[kind] for phase in phases.values()) for kind in peaks.mebibytes}
    return phases | {"num_trained_parameters": trainers[0].num_parameters[0]}


def one_round(trainers: list[Any], number: int) -> None:
    from toolkit.merging.memory import merge_state_dicts

    for trainer in trainers:
        trainer.fit(number * STEPS_A_ROUND)
        trainer.evaluate()
        trainer.save()
    states = [trainer.state() for trainer in trainers]
    merged = merge_state_dicts(states, "linear", weight=[1 / len(states)] * len(states))
    slots = [trainer.optimizer_state() for trainer in trainers]
    for trainer, own in zip(trainers, slots, strict=True):
        trainer.load_state(merged)
        trainer.load_optimizer_state(own)
        trainer.evaluate()


def measure(model: str, task: str, repeats: int) -> dict[str, Any]:
    runs: dict[int, list[dict[str, Any]]] = {1: [], NUM_LOCALES: []}
    for repeat in range(repeats):
        for num_locales in (1, NUM_LOCALES) if repeat % 2 == 0 else (NUM_LOCALES, 1):
            command = [sys.executable, __file__, "--one", model, task, str(num_locales)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[num_locales].append(json.loads(result.stdout.splitlines()[-1]))
            print(task, num_locales, runs[num_locales][-1], flush=True)
    report: dict[str, Any] = {"num_trained_parameters_a_locale": runs[1][0]["num_trained_parameters"]}
    for phase in ("whole", "training"):
        for kind in ("VmRSS", "RssAnon"):
            medians = {n: statistics.median(run[phase][kind] for run in found) for n, found in runs.items()}
            row: dict[str, float] = {f"{n}_locales_mebibytes": round(v, 1) for n, v in medians.items()}
            report[f"{phase}, {kind}"] = row | {"ratio": round(medians[NUM_LOCALES] / medians[1], 3)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", help="folder of multilingual-e5-small")
    parser.add_argument("--language-model", help="folder of smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "TASK", "LOCALES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        model, task, num_locales = arguments.one
        print(json.dumps(train(model, task, int(num_locales))))
        return
    report: dict[str, Any] = {
        "command": "python bench/locales_memory.py --encoder FOLDER --language-model FOLDER",
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "repeats": arguments.repeats,
        "models": {},
    }
    for model, task in (
        (arguments.encoder, "sequence-classification"),
        (arguments.language_model, "causal-lm"),
    ):
        if model is not None:
            report["models"][Path(model).name] = measure(model, task, arguments.repeats)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
