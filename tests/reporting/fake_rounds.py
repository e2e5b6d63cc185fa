"""A synthetic iterative run through the real listeners, to look at the terminal, the files and the report.

python tests/reporting/fake_rounds.py OUT --participants 4 --epochs 6 --seconds-per-step 0.02 [--resume EPOCH]
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from toolkit.config.recipes import CentralizedConfig
from toolkit.reporting.records import (
    CheckpointRecord,
    ComparisonRecord,
    EvaluationRecord,
    MergeRecord,
    Record,
    RoundRecord,
    RunEnd,
    RunStart,
    StepRecord,
)
from toolkit.rounds.monitor import build_listeners

LOCALES = [
    *(
        "en-US",
        "fr-FR",
        "de-DE",
        "sq-AL",
        "es-ES",
        "it-IT",
        "pt-PT",
        "nl-NL",
        "sv-SE",
        "da-DK",
        "pl-PL",
        "cs-CZ",
    ),
    *(
        "fi-FI",
        "el-GR",
        "ro-RO",
        "hu-HU",
        "tr-TR",
        "ja-JP",
        "ko-KR",
        "th-TH",
        "vi-VN",
        "id-ID",
        "sw-KE",
        "am-ET",
    ),
]
STEPS_PER_EPOCH = 20
MERGE_EVERY = 2


class FakeRounds:
    """What an iterative run with ``names`` would say.

    The gate rejects the last participant's merges; with four or more participants the second one stops early after
    epoch 4 and the third one fails in epoch 3.
    """

    def __init__(self, names: Sequence[str], num_epochs: int) -> None:
        self.names = list(names)
        self.num_epochs = num_epochs
        self.num_steps = num_epochs * STEPS_PER_EPOCH

    def start(self) -> RunStart:
        return RunStart(
            recipe="iterative-merge",
            title="Synthetic rounds",
            rows=[("Locales", ", ".join(self.names)), ("Merge", "linear, each locale its own mixture")],
            num_steps=self.num_steps,
            participants=self.names,
            num_epochs=self.num_epochs,
        )

    def records(self, *, first_epoch: int = 1) -> Iterator[Record]:
        if first_epoch == 1:
            for name in self.names:
                yield self.evaluation(name, 0, "before")
        for epoch in range(first_epoch, self.num_epochs + 1):
            yield from self.round(epoch)
        yield self.comparison()

    def round(self, epoch: int) -> Iterator[Record]:
        active = self.active(epoch)
        for name in self.active(epoch - 1):
            last = epoch * STEPS_PER_EPOCH if name in active or name in self.stopped(epoch) else 50
            for step in range((epoch - 1) * STEPS_PER_EPOCH + 1, last + 1):
                yield self.step(name, step)
        for name in active:
            yield self.evaluation(name, epoch, "during" if epoch < self.num_epochs else "after")
        if epoch % MERGE_EVERY == 0:
            yield self.merge(epoch)
        for name in active:
            step = epoch * STEPS_PER_EPOCH
            yield CheckpointRecord(participant=name, step=step, path=f"{name}/checkpoints/step-{step:08d}")
        is_due = epoch % MERGE_EVERY == 0
        yield RoundRecord(
            round=epoch,
            epoch=epoch,
            num_epochs=self.num_epochs,
            steps=dict.fromkeys(active, epoch * STEPS_PER_EPOCH),
            active=active,
            stopped=self.stopped(epoch),
            failed=self.failed(epoch),
            seconds=12.5,
            decision={
                "should_merge": is_due,
                "reason": f"every {MERGE_EVERY} epochs"
                if is_due
                else f"the next one is due after epoch {epoch + 1}",
                "trigger": "frequency" if is_due else "none",
                "confidence": 1.0,
                "recommended_frequency": MERGE_EVERY,
            },
        )

    def active(self, epoch: int) -> list[str]:
        gone = self.stopped(epoch).keys() | self.failed(epoch).keys()
        return [name for name in self.names if name not in gone]

    def stopped(self, epoch: int) -> dict[str, str]:
        is_gone = len(self.names) >= 4 and epoch >= 4
        return {self.names[1]: "no better for 2 evaluations (accuracy 0.8123)"} if is_gone else {}

    def failed(self, epoch: int) -> dict[str, str]:
        is_gone = len(self.names) >= 4 and epoch >= 3
        return {self.names[2]: "the training loss is nan at step 50"} if is_gone else {}

    def step(self, name: str, step: int) -> StepRecord:
        noise = random.Random(f"{name}/{step}")
        loss = 0.2 + 2.6 * math.exp(-4 * step / self.num_steps) + abs(noise.gauss(0, 0.1))
        num_tokens = noise.randint(900, 1600)
        return StepRecord(
            participant=name,
            step=step,
            epoch=step / STEPS_PER_EPOCH,
            num_steps=self.num_steps,
            loss=math.nan if len(self.names) >= 4 and name == self.names[2] and step == 50 else loss,
            learning_rate=1e-4 * (1 - step / self.num_steps),
            grad_norm=1.0 + noise.random(),
            num_tokens=num_tokens,
            num_trainable_tokens=num_tokens,
            total_tokens=1250 * step,
            total_trainable_tokens=1250 * step,
            step_seconds=0.2 * noise.uniform(0.9, 1.1),
            tokens_per_second=num_tokens / 0.2,
            memory_bytes=int(1.9e9),
            batch_digest="0" * 8,
        )

    def metrics(self, name: str, epoch: int) -> dict[str, float]:
        ceiling = 0.95 - 0.02 * self.names.index(name)
        accuracy = ceiling - 0.8 * math.exp(-4 * epoch / self.num_epochs)
        return {"loss": 3 * (1 - accuracy), "accuracy": accuracy, "f1": accuracy - 0.02, "num_tokens": 8984}

    def evaluation(self, name: str, epoch: int, phase) -> EvaluationRecord:
        return EvaluationRecord(
            participant=name,
            step=epoch * STEPS_PER_EPOCH,
            epoch=float(epoch),
            phase=phase,
            metrics=self.metrics(name, epoch),
            seconds=0.7,
        )

    def merge(self, epoch: int) -> MergeRecord:
        active = self.active(epoch)
        before = {name: self.metrics(name, epoch) for name in active}
        after = {
            name: {m: v + (-0.03 if name == active[-1] else 0.02) for m, v in metrics.items()}
            for name, metrics in before.items()
        }
        return MergeRecord(
            round=epoch,
            epoch=epoch,
            steps=dict.fromkeys(active, epoch * STEPS_PER_EPOCH),
            participants=active,
            method="linear",
            status="merged",
            weights={name: self.weights(name, active) for name in active},
            reason=f"every {MERGE_EVERY} epochs",
            trigger="frequency",
            confidence=1.0,
            decision_metrics={"epochs_since_merge": MERGE_EVERY},
            gate={name: "rejected" if name == active[-1] else "accepted" for name in active},
            before=before,
            after=after,
            seconds=1.25,
            attempts=1,
            path=f"merged_models/iterative_merge_{'_'.join(active[:3])}_20261123_04{epoch:02d}00",
        )

    def weights(self, target: str, sources: Sequence[str]) -> dict[str, float]:
        raw = {
            name: 3.0 if name == target else random.Random(f"{min(name, target)}{max(name, target)}").random()
            for name in sources
        }
        return {name: value / sum(raw.values()) for name, value in raw.items()}

    def comparison(self) -> ComparisonRecord:
        verdicts = {name: ("helped", "no difference", "hurt")[i % 3] for i, name in enumerate(self.names)}
        rows = [
            [
                name,
                "0.0612",
                "0.8811",
                "0.8450",
                "0.7012 en-US",
                "0.9023",
                "+0.0212 [+0.0101, +0.0313]",
                verdict,
            ]
            for name, verdict in verdicts.items()
        ]
        return ComparisonRecord(
            columns=[
                "locale",
                "base",
                "own training",
                "last merge",
                "best source",
                "iterative",
                "improvement",
                "verdict",
            ],
            rows=rows,
            verdicts=verdicts,
            comparison={
                "metric": "accuracy",
                "participants": {row[0]: {"iterative": 0.9023} for row in rows},
            },
            notes=[
                "accuracy on held-out rows; difference of iterative and own training with its 95 % interval"
            ],
        )

    def end(self, run_dir: Path) -> RunEnd:
        return RunEnd(
            status="done",
            summary=[("Merges", str(self.num_epochs // MERGE_EVERY))],
            paths=[("Model saved to", str(run_dir / "final_model"))],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--participants", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seconds-per-step", type=float, default=0.0)
    parser.add_argument("--resume", type=int, default=0, help="epochs that were done before")
    parser.add_argument("--report-to", nargs="*", default=["tensorboard"])
    arguments = parser.parse_args()
    config = CentralizedConfig(model="m", data="d", output_dir=arguments.out, report_to=arguments.report_to)
    names = [*LOCALES, *(f"xx-{number:03d}" for number in range(100))][: arguments.participants]
    run = FakeRounds(names, arguments.epochs)
    restored = dict.fromkeys(names, arguments.resume * STEPS_PER_EPOCH) if arguments.resume else None
    listener, _ = build_listeners(arguments.out, config, is_main_process=True, resumed_history=restored)
    with listener:
        listener.handle(run.start())
        for record in run.records(first_epoch=arguments.resume + 1):
            listener.handle(record)
            if isinstance(record, StepRecord):
                time.sleep(arguments.seconds_per_step)
        listener.handle(run.end(arguments.out))


if __name__ == "__main__":
    main()
