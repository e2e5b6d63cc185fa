"""Measures a transformers Trainer from inside its process: the same for every arm.

A script of your own calls ``Probe.from_arguments()`` first, ``probe.attach(trainer)`` before ``trainer.train()`` and
``probe.finish()`` after it.
"""

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from toolkit.durable import write_json
from toolkit.reporting import resources
from toolkit.trials.digest import IGNORED, RowDigest
from toolkit.trials.flops import flops_per_token

SCHEMA = 1
MAX_PROBE_TOKENS = 256
"""Of each row whose loss is measured before and after: logits of longer rows would be the peak of the memory."""


class Probe:
    """Times, counts and checks of one trial.

    Args:
        spec: what the runner wrote for this trial.

    Attributes:
        spec, settings: the whole specification, and the options that all arms share.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.began = time.monotonic()
        self.spec, self.settings = spec, spec["settings"]
        self.steps: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        self.rows = RowDigest()
        self._counted: list[dict[str, int]] = []
        self._trainer: Any = None
        self._gpu_bytes: int | None = None

    @classmethod
    def from_arguments(cls) -> "Probe":
        """The probe of a script that was started as ``python SCRIPT SPEC.json``."""
        return cls(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    def attach(self, trainer: Any) -> None:
        """Measure ``trainer``, a transformers Trainer that has not trained yet."""
        from toolkit.trials.stopwatch import Stopwatch

        self._trainer = trainer
        collate = trainer.data_collator

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            self.count(batch)
            return batch

        trainer.data_collator = counted
        trainer.add_callback(Stopwatch(self))

    def count(self, batch: Any) -> None:
        """A micro-batch was made; it is trained in its turn (batches are made a little ahead)."""
        before = self.rows.as_dict()
        self.rows.add(batch)
        after = self.rows.as_dict()
        self._counted.append({name: after[name] - before[name] for name in before if name.startswith("num_")})

    # Called by the stopwatch

    def training_begins(self, model: Any) -> None:
        import torch

        self.facts = self._facts_of(model)
        self.facts["initial_loss"] = self.probe_loss(model)
        self._fingerprint = _fingerprint(model)
        self.facts["load_seconds"] = time.monotonic() - self.began
        self.facts["load_peak_rss_bytes"] = _peak_rss_bytes()
        _reset_peak_rss()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def step_ends(self, began: float, ended: float, num_batches: int) -> None:
        used = resources.process_gpu_bytes()
        self._gpu_bytes = used if used is None else max(used, self._gpu_bytes or 0)
        counted, self._counted = self._counted[:num_batches], self._counted[num_batches:]
        step = {name: sum(counts[name] for counts in counted) for name in (counted or [{}])[0]}
        self.steps.append(step | {"seconds": ended - began})

    def training_ends(self, model: Any) -> None:
        self.facts |= _memory() | {"peak_process_gpu_bytes": self._gpu_bytes}
        self.facts["num_tensors_moved"], self.facts["num_tensors_trained"] = _moved(
            self._fingerprint, _fingerprint(model)
        )
        self.facts["final_loss"] = self.probe_loss(model)

    def finish(self) -> None:
        """Write what was measured. The main process alone, and last: a trial without it has failed."""
        if self._trainer is None or not self._trainer.is_world_process_zero():
            return
        # Batches that were made ahead and never trained are none of the rows.
        assert not self._counted, "batches were made that no step trained"
        result = {
            "schema": SCHEMA,
            "steps": self.steps,
            "losses": self.losses,
            "rows": self.rows.as_dict(),
            "facts": self.facts | {"whole_seconds": time.monotonic() - self.began},
        }
        write_json(
            Path(self.spec["result"]), json.loads(json.dumps(result, allow_nan=True), parse_constant=str)
        )

    # Inside

    def _facts_of(self, model: Any) -> dict[str, Any]:
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        args = self._trainer.args
        facts: dict[str, Any] = {
            "unsloth": "unsloth" in sys.modules,
            "trainer": type(self._trainer).__qualname__,
            "model": type(model).__qualname__,
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
            "gradient_checkpointing": bool(getattr(model, "is_gradient_checkpointing", False)),
            "optim": str(getattr(args.optim, "value", args.optim)),
            "world_size": args.world_size,
            "device": args.device.type,
            "num_trainable": sum(p.numel() for p in trained),
            "num_threads": torch.get_num_threads(),
        }
        return facts | {"flops_per_token": flops_per_token(model, self.spec["mean_row_tokens"])}

    def probe_loss(self, model: Any) -> float:
        """Mean cross-entropy over the labelled tokens of the probe's rows, each row by itself, no gradients."""
        import torch

        rows = json.loads(Path(self.spec["probe_rows"]).read_text(encoding="utf-8"))
        device = next(p.device for p in model.parameters())
        was_training, total, count = model.training, 0.0, 0
        model.eval()
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([row["input_ids"][:MAX_PROBE_TOKENS]], device=device)
                labels = torch.tensor(row["labels"][:MAX_PROBE_TOKENS], device=device)[1:]
                if not bool((labels != IGNORED).any()):
                    continue
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(
                    logits.float(), labels, ignore_index=IGNORED, reduction="sum"
                )
                total, count = total + float(loss), count + int((labels != IGNORED).sum())
        model.train(was_training)
        return total / max(count, 1)


def _fingerprint(model: Any) -> dict[str, tuple[float, float]]:
    """Sum and sum of squares of each trained tensor."""
    import torch

    with torch.no_grad():
        return {
            name: (float(p.double().sum()), float(p.double().square().sum()))
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def _moved(before: dict[str, Any], after: dict[str, Any]) -> tuple[int, int]:
    return sum(before.get(name) != value for name, value in after.items()), len(after)


def _memory() -> dict[str, Any]:
    """Peaks since training began, in bytes; None where the device has no such thing."""
    import torch

    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    memory: dict[str, Any] = {"peak_rss_bytes": _peak_rss_bytes()}
    memory["peak_allocated_bytes"] = torch.cuda.max_memory_allocated() if on_cuda else None
    memory["peak_reserved_bytes"] = torch.cuda.max_memory_reserved() if on_cuda else None
    return memory


def _peak_rss_bytes() -> int:
    """Peak resident memory of this process since the last reset (on Linux), else since its start."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):  # elsewhere than on Linux, and without the right to
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
