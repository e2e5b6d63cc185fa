"""What a run prints before and after: rows of label and value."""

import importlib.metadata
from pathlib import Path
from typing import Any


def configuration_rows(config: Any, plan: Any, prepared: Any, trainer: Any) -> list[tuple[str, str]]:
    """The guide's training configuration, and what decides speed and memory."""
    processes = plan.num_processes
    effective = config.batch_size * config.gradient_accumulation_steps * processes
    trained, total = trainer.num_parameters
    rows = [
        ("Model", config.model),
        ("Task", config.task),
        ("Training samples", str(len(prepared.train))),
        ("Validation samples", str(len(prepared.evaluation)) if prepared.evaluation is not None else "none"),
        ("Epochs", f"{trainer.num_steps / trainer.num_steps_per_epoch:.4g}"),
        ("Batch size", str(config.batch_size)),
        ("Effective batch size", str(effective)),
        ("Steps", f"{trainer.num_steps} ({trainer.num_steps_per_epoch} an epoch)"),
        (
            "Learning rate",
            f"{config.learning_rate:g} ({config.lr_scheduler}, warm-up {config.warmup_ratio:g})",
        ),
        ("Longest sequence", f"{config.max_length} tokens{', packed' if config.packing else ''}"),
        ("Trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        ("Fine-tuning", _finetuning(config)),
        ("Device", _device(plan)),
        ("Precision", _precision(config, plan)),
    ]
    if getattr(trainer.model, "is_gradient_checkpointing", False):
        rows.append(("Gradient checkpointing", "on"))
    if config.backend == "unsloth":
        rows.append(("Backend", f"Unsloth {importlib.metadata.version('unsloth')}"))
    return rows


def result_rows(journal: Any, trainer: Any, seconds: float) -> list[tuple[str, str]]:
    """Held-out metrics before and after, steps, tokens and time."""
    rows: list[tuple[str, str]] = []
    before, after = _metrics(journal, "before"), _metrics(journal, "after")
    for name in after:
        if name != "num_tokens":
            change = f"{before[name]:.4f} before, " if name in before else ""
            rows.append((f"Held-out {name}", f"{change}{after[name]:.4f} after"))
    totals = trainer.totals
    rows += [
        ("Steps", str(trainer.step)),
        ("Tokens", f"{totals['tokens']:,} ({totals['trainable_tokens']:,} trained)"),
        ("Time of this session", f"{seconds / 60:.1f} min"),
    ]
    return rows


def _metrics(journal: Any, phase: str) -> dict[str, float]:
    found = [r for r in journal.records("evaluation") if r["phase"] == phase]
    return found[-1]["metrics"] if found else {}


def _finetuning(config: Any) -> str:
    if config.finetuning == "full":
        return "all weights"
    kind = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    targets = config.lora_target_modules
    where = targets if isinstance(targets, str) else ", ".join(targets)
    return f"{kind} r={config.lora_r} alpha={config.lora_alpha:g} on {where}"


def _device(plan: Any) -> str:
    count = "1 process" if plan.num_processes == 1 else f"{plan.num_processes} processes"
    where = f"GPU {', '.join(plan.gpus)}" if plan.gpus else plan.device.upper()
    deepspeed = ""
    if plan.deepspeed is not None:
        deepspeed = f", DeepSpeed {Path(plan.deepspeed).name}"
    return f"{where}, {count}{deepspeed}"


def _precision(config: Any, plan: Any) -> str:
    base = (
        "4-bit base"
        if config.load_in_4bit
        else "8-bit base"
        if config.load_in_8bit
        else f"base {config.dtype}"
    )
    nested = ", nested quantization" if config.load_in_4bit and config.nested_quant else ""
    return f"{base}{nested}, mixed precision {plan.mixed_precision}"
