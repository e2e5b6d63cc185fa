"""Time stamps at the ends of steps. Apart from the probe, which scripts import before transformers."""

import time
from typing import Any

import torch
from transformers import TrainerCallback


class Stopwatch(TrainerCallback):
    """A step lasts from the end of the one before it to its own end, so that reading data, logging and what the
    trainer does between steps count too."""

    def __init__(self, probe: Any) -> None:
        self._probe = probe
        self._began = 0.0
        self._num_batches = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._probe.training_begins(model)
        self._began = time.perf_counter()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._num_batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        ended = time.perf_counter()
        self._probe.step_ends(self._began, ended, self._num_batches)
        self._began, self._num_batches = ended, 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self._probe.losses.append(float(logs["loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._probe.training_ends(model)
