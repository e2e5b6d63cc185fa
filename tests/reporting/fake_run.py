"""A synthetic run through the real listeners, to look at the terminal, the files and the report.

python tests/reporting/fake_run.py OUT --participants 4 --steps 300 --seconds-per-step 0.05 [--fail]
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from toolkit.config.recipes import CentralizedConfig
from toolkit.reporting import environment, listeners, resources
from toolkit.reporting.records import (
    CheckpointRecord,
    EvaluationRecord,
    MessageRecord,
    Phase,
    Record,
    RunEnd,
    RunStart,
    SampleRecord,
    StepRecord,
)

LOCALES = [
    *("en-US", "fr-FR", "de-DE", "es-ES", "it-IT", "pt-PT", "sq-AL", "nl-NL", "sv-SE"),
    *("da-DK", "pl-PL", "cs-CZ", "fi-FI", "el-GR", "ro-RO", "hu-HU", "tr-TR", "ja-JP"),
]
NUM_EPOCHS = 3
PROMPT = "Turn on the light in the kitchen."


def participant_names(count: int) -> list[str]:
    if count == 1:
        return ["model"]
    return [*LOCALES, *(f"client-{number}" for number in range(count))][:count]


def start(names: list[str], num_steps: int) -> RunStart:
    rows = [
        ("Model", "SmolLM2-135M-Instruct (134.5 M parameters)"),
        ("Adapter", "LoRA r=16 alpha=32 on all-linear (4.88 M trainable, 3.5 %)"),
        ("Training samples", "800"),
        ("Validation samples", "100"),
        ("Epochs", str(NUM_EPOCHS)),
        ("Batch size", "1"),
        ("Effective batch size", "8"),
        ("Learning rate", "1e-04, linear, warm-up 3 %"),
        ("Device", "cpu, 2 threads, fp32 <b>&amp;</b>"),
    ]
    problems = ["3 rows repeat an earlier one"]
    check = {
        "num_rows": 800,
        "trainable_share": 0.41,
        "lengths": {"median": 212, "maximum": 1411},
        "problems": problems,
    }
    return RunStart(
        recipe="centralized-hf",
        title="Synthetic run",
        rows=rows,
        num_steps=num_steps,
        participants=names,
        num_epochs=NUM_EPOCHS,
        data_check=check,
    )


def step_record(name: str, step: int, num_steps: int, seconds: float) -> StepRecord:
    """A record that depends on nothing but its arguments."""
    noise = random.Random(f"{name}/{step}")
    digest = hashlib.sha256(name.encode()).hexdigest()
    offset = int(digest, 16) % 100 / 100
    done = step / num_steps
    num_tokens = noise.randint(900, 1600)
    seconds = max(seconds, 1e-4) * (3 if step == 1 else noise.uniform(0.9, 1.1))
    gpu = {
        "utilization_percent": noise.uniform(80, 99),
        "power_watts": noise.uniform(250, 320),
        "memory_used_bytes": 18e9,
    }
    return StepRecord(
        participant=name,
        step=step,
        epoch=NUM_EPOCHS * done,
        num_steps=num_steps,
        loss=0.4 + 0.3 * offset + 2.6 * math.exp(-5 * done) + noise.gauss(0, 0.12),
        learning_rate=1e-4 * min(done / 0.03, (1 - done) / 0.97),
        grad_norm=0.6 + 2 * math.exp(-8 * done) + abs(noise.gauss(0, 0.2)),
        num_tokens=num_tokens,
        num_trainable_tokens=num_tokens // 3,
        total_tokens=1250 * step,
        total_trainable_tokens=416 * step,
        step_seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        memory_bytes=int(1.9e9 + 4e8 * min(1.0, 8 * done)),
        gpu=gpu,
        batch_digest=hashlib.sha256(f"{name}/{step}".encode()).hexdigest()[:16],
    )


def evaluation(name: str, step: int, num_steps: int, phase: Phase) -> EvaluationRecord:
    loss = 0.5 + 2.6 * math.exp(-4 * step / num_steps)
    return EvaluationRecord(
        participant=name,
        step=step,
        epoch=NUM_EPOCHS * step / num_steps,
        phase=phase,
        metrics={"loss": loss, "accuracy": 1 - loss / 3.5, "num_tokens": 8984},
        seconds=2.5,
    )


def records(
    names: list[str], num_steps: int, seconds: float = 0.0, *, first_step: int = 1
) -> Iterator[Record]:
    """Steps, evaluations, checkpoints and samples of a run, from ``first_step`` on."""
    if first_step == 1:
        for name in names:
            yield evaluation(name, 0, num_steps, "before")
            yield SampleRecord(participant=name, phase="before", prompt=PROMPT, answer="I am an AI model.")
    every = max(1, num_steps // NUM_EPOCHS)
    for step in range(first_step, num_steps + 1):
        for name in names:
            yield step_record(name, step, num_steps, seconds)
            if step % every == 0:
                yield evaluation(name, step, num_steps, "during")
                path = f"{name}/checkpoints/step-{step:08d}"
                yield CheckpointRecord(participant=name, step=step, path=path)
    for name in names:
        answer = ("The light in the kitchen is on now. " * 6).strip()
        yield SampleRecord(participant=name, phase="after", prompt=PROMPT, answer=answer)
        yield evaluation(name, num_steps, num_steps, "after")


def end(run_dir: Path) -> RunEnd:
    paths = [("Model saved to", str(run_dir / "final_model")), ("Report", str(run_dir / "report.html"))]
    summary = [("Training loss", "3.02 -> 0.41"), ("Held-out loss", "3.10 -> 0.55"), ("Tokens", "375,000")]
    return RunEnd(status="done", summary=summary, paths=paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--participants", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seconds-per-step", type=float, default=0.0)
    parser.add_argument("--fail", action="store_true", help="Ctrl-C half-way")
    parser.add_argument("--report-to", nargs="*", default=["tensorboard"])
    arguments = parser.parse_args()
    config = CentralizedConfig(model="m", data="d", output_dir=arguments.out, report_to=arguments.report_to)
    names = participant_names(arguments.participants)
    begin = time.perf_counter()
    with listeners.build(arguments.out, config, is_main_process=True) as listener:
        (arguments.out / "environment.json").write_text(json.dumps(environment.describe()))
        listener.handle(start(names, arguments.steps))
        for record in records(names, arguments.steps, arguments.seconds_per_step):
            listener.handle(record)
            if not isinstance(record, StepRecord):
                continue
            resources.snapshot()
            time.sleep(arguments.seconds_per_step)
            if record.step == arguments.steps // 2 and record.participant == names[0]:
                text = "Row 17 is longer than 1536 tokens: cut. " * 4
                listener.handle(MessageRecord(level="warning", text=text))
                warnings.warn("a library warns", stacklevel=1)
                if arguments.fail:
                    raise KeyboardInterrupt
        listener.handle(end(arguments.out))
    sys.stderr.write(f"{time.perf_counter() - begin:.2f} s\n")


if __name__ == "__main__":
    main()
