"""Memory of eight LoRA locales on one base against one.

    python bench/locales_memory.py [--encoder FOLDER] [--language-model FOLDER] [--repeats 1] [--out FILE]

Each arm is a run of `meldkit train iterative-merge` with LoRA in its defaults, on made-up rows: two epochs of one step
a locale, an evaluation and a merge after each, one optimizer and one checkpoint a locale, no baselines. Read from
/proc/PID/status every ten milliseconds: the kernel's own peak of resident memory (VmHWM), and the largest anonymous
part (RssAnon: heaps and tensors, without files that are mapped). Arms alternate 1 8 8 1; medians and ratios are
reported.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOCALES = ("de-DE", "en-US", "es-ES", "fi-FI", "fr-FR", "hu-HU", "ja-JP", "sw-KE")
NUM_STEPS_AN_EPOCH = 1
SAMPLE_SECONDS = 0.01
MEASURES = ("VmHWM", "RssAnon")


@dataclass(frozen=True)
class Shape:
    """Rows of a batch, tokens and words of a row, classes (0: a language model)."""

    batch_size: int
    max_length: int
    num_words: int
    num_classes: int


SHAPES = {"sequence-classification": Shape(16, 32, 9, 60), "causal-lm": Shape(4, 256, 120, 0)}


def write_rows(folder: Path, shape: Shape, locale: str) -> None:
    """train.jsonl and validation.jsonl of one locale, no row twice."""
    words = [f"{verb}{noun}" for verb in ("play", "call", "stop", "wake") for noun in ("", "er", "ing", "s")]
    generator = random.Random(locale)
    folder.mkdir(parents=True)
    for split, number in (
        ("train", NUM_STEPS_AN_EPOCH * shape.batch_size),
        ("validation", shape.batch_size // 2),
    ):
        rows = []
        for index in range(number):
            text = f"{locale} {split} {index} " + " ".join(generator.choices(words, k=shape.num_words))
            label = {"label": f"class {index % shape.num_classes}"} if shape.num_classes else {}
            rows.append(json.dumps({"text": text, **label}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))


def run(model: str, task: str, num_locales: int) -> dict[str, float]:
    """Peaks in MiB of a run."""
    shape, locales = SHAPES[task], LOCALES[:num_locales]
    with tempfile.TemporaryDirectory() as folder:
        for locale in locales:
            write_rows(Path(folder) / "data" / locale, shape, locale)
        options = {
            "model": model,
            "task": task,
            "locales": ",".join(locales),
            "data": f"{folder}/data/{{locale}}",
            "output-dir": f"{folder}/run",
            "data-cache": f"{folder}/cache",
            "finetuning": "lora",
            "weight-calculation": "average",
            "max-epochs": 2,
            "merge-frequency": 1,
            "batch-size": shape.batch_size,
            "eval-batch-size": shape.batch_size,
            "max-length": shape.max_length,
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "toolkit", "train", "iterative-merge", *words, "--cpu"]
        with open(f"{folder}/output.txt", "w+b") as output:
            process = subprocess.Popen([*command, "--no-baselines"], stdout=output, stderr=subprocess.STDOUT)
            peaks = watch(process)
            if process.returncode != 0:
                output.seek(0)
                raise SystemExit(output.read().decode(errors="replace")[-3000:])
    return peaks


def watch(process: subprocess.Popen[bytes]) -> dict[str, float]:
    peaks: dict[str, float] = dict.fromkeys(MEASURES, 0.0)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) / 1024)
        time.sleep(SAMPLE_SECONDS)
    return peaks


def measure(model: str, task: str, repeats: int) -> dict[str, Any]:
    runs: dict[int, list[dict[str, float]]] = {1: [], len(LOCALES): []}
    for repeat in range(repeats):
        for num_locales in sorted(runs, reverse=bool(repeat % 2)):
            runs[num_locales].append(run(model, task, num_locales))
            print(task, num_locales, runs[num_locales][-1], flush=True)
    report: dict[str, Any] = {"task": task, **asdict(SHAPES[task])}
    for kind in MEASURES:
        one, all_of_them = (statistics.median(peaks[kind] for peaks in found) for found in runs.values())
        report[kind] = {
            "1_locale_mebibytes": round(one, 1),
            f"{len(LOCALES)}_locales_mebibytes": round(all_of_them, 1),
            "ratio": round(all_of_them / one, 3),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", help="folder of multilingual-e5-small")
    parser.add_argument("--language-model", help="folder of smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
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
