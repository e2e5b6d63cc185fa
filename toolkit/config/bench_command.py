"""The options of ``meldkit bench``."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from toolkit.config.options import (
    AdapterOptions,
    DataOptions,
    LaunchOptions,
    LossTarget,
    ModelOptions,
    Options,
    OverlongPolicy,
    QuantizationOptions,
    TrainingOptions,
)


class MeasurementOptions(Options):
    """Measurement"""

    arms: list[str] = Field(default_factory=lambda: ["hf", "trl"], min_length=1)
    """What is compared, the reference first: names of shipped arms (meldkit bench arms lists them) or YAML files of
    your own."""

    repeats: int = Field(3, ge=1)
    """Trials of each arm, each in a process of its own. Their order turns round from one repeat to the next."""

    warmup_steps: int = Field(3, ge=1)
    """Steps at the beginning of each trial that are not counted; the first one, with what it compiles, is reported
    by itself."""

    trial_minutes: float = Field(60.0, gt=0)
    """A trial that takes longer is ended and counts as a time-out."""

    loss_tolerance: float = Field(0.02, ge=0)
    """Arms whose loss on the same rows before the first step differs by a larger share do not train the same model."""

    peak_tflops: float | None = Field(None, gt=0)
    """What the device can do, in dense 16-bit TFLOP/s, for MFU. Default: the data sheet's figure of a known GPU."""

    order_seed: int = Field(0, ge=0)
    """Decides which arm begins."""

    out: Path
    """Folder for the results: benchmark.json, report.md, plots and a JSON and a log of every trial."""

    resume: bool = False
    """Go on with the benchmark in --out that was interrupted: its finished trials are kept."""


class BenchTrainConfig(
    MeasurementOptions,
    ModelOptions,
    AdapterOptions,
    QuantizationOptions,
    DataOptions,
    TrainingOptions,
    LaunchOptions,
):
    """Compare ways to train one model on the same rows: speed, memory and loss, each trial in a process of its own."""

    unavailable: ClassVar = {
        "backend": "is decided by each arm",
        "max_steps": "has no place here: arms that batch otherwise would train other rows; --max-rows shortens",
        "eval_every": "has no place here: the loss is measured before the first step and after the last",
        "checkpoint_every": "has no place here: nothing is saved while it is measured",
        "keep_checkpoints": "has no place here: nothing is saved while it is measured",
        "logging_steps": "has no place here: every step is measured",
        "dataloader_workers": "has no place here: batches are counted where they are made, in the trial's process",
        "trainer_args": "is for an arm: options.trainer_args in its YAML file",
        "deepspeed": "is not measured yet",
        "skip_data_check": "has no place here: the check is about answers, not about speed",
    }

    model: str = "sample:smollm2-135m-instruct"
    """The model that all arms train: a hub id, a folder in the Hugging Face layout, or a sample model (sample:NAME)."""

    data: str = "sample:conversations"
    """The rows that all arms train: a file with messages, prompt and completion, or text; or sample:NAME."""

    max_rows: int | None = Field(64, ge=1)
    """Use the first N rows of the training data only."""

    max_length: int = Field(1024, ge=8)
    """Longest sequence in tokens."""

    overlong: OverlongPolicy = "truncate"
    """Rows over --max-length: bare scripts cut their end, so the others do."""

    loss_on: LossTarget = "all"
    """Tokens that are trained. Bare scripts train all."""

    max_epochs: float = Field(2.0, ge=1)
    """Passes over the rows: a whole number, so that all arms train the same."""

    batch_size: int = Field(8, ge=1)
    """Rows a device and step."""

    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches whose gradients are added up before an optimizer step."""


class BenchCompareConfig(Options):
    """Did a change make training slower or hungrier? Exit status 1 where it did."""

    runs: list[Path] = Field(min_length=2, max_length=2)
    """The results before and after: two folders or their benchmark.json. In place of the flag: meldkit bench compare
    OLD NEW."""

    max_slowdown: str = "5%"
    """Largest increase of the time a token that passes, as 5% or 0.05. One that could be noise (its interval reaches
    zero) passes too."""

    max_mem: str = "3%"
    """Largest increase of peak memory that passes."""

    metric: Literal["tokens", "trainable_tokens"] = "trainable_tokens"
    """What a second is measured in."""

    force: bool = False
    """Compare although the hardware, the workload or the arms differ."""
