"""DeepSpeed: the configuration that the Trainer fills, and what is checked before anything starts."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.cache_folder import cache_folder
from toolkit.config.options import Options, TrainingOptions
from toolkit.dependencies import is_installed
from toolkit.errors import LaunchError, MissingDependencyError

if TYPE_CHECKING:
    from toolkit.launch.plan import LaunchPlan

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def check(
    source: str | None, config: Options, *, device: str, mixed_precision: str, notes: list[str]
) -> int | None:
    """Check that DeepSpeed can run as asked; return its ZeRO stage (0 to 3), None without DeepSpeed.

    Args:
        source: ``zero1``, ``zero2``, ``zero3``, the path of a JSON file, or None.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        LaunchError: the file is missing, broken or contradicts the options; tools to build its CPU operators
            are missing; bf16 on a CPU, which transformers refuses with DeepSpeed.
    """
    if source is None:
        return None
    if not is_installed("deepspeed"):
        raise MissingDependencyError("deepspeed", purpose=f"--deepspeed {source}", extra="deepspeed")
    if device == "cpu" and mixed_precision != "no":
        raise LaunchError(
            f"--deepspeed {source} with --mixed-precision {mixed_precision} needs a GPU",
            hint="on the CPU use --mixed-precision no with DeepSpeed",
        )
    if device == "cpu":
        # DeepSpeed builds its communication operator when a process group of CPU processes is first used.
        for tool, install in (("ninja", "pip install ninja"), ("c++", "apt-get install g++")):
            if shutil.which(tool, path=_search_path(os.environ)) is None:
                raise LaunchError(
                    f"DeepSpeed on a CPU builds an operator and needs {tool} on the PATH", hint=install
                )
    if source in STAGES:
        notes.append(f"deepspeed {source}: values marked auto are filled by the Trainer from the options")
        return STAGES[source]
    values = read_file(Path(source))
    if isinstance(config, TrainingOptions) and (problems := conflicts(values, config, mixed_precision)):
        raise LaunchError(
            "\n".join(
                [f"{source} contradicts the options of this run:", *(f"  - {line}" for line in problems)]
            ),
            hint='write "auto" for these values in the file, or give the options the same values',
        )
    notes.append(f"deepspeed: {source}, checked against the options")
    return zero_stage(values)


def read_file(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON configuration.

    Raises:
        LaunchError: no such file, not JSON (with the line), not an object, or an impossible ZeRO stage.
    """
    names = ", ".join(STAGES)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise LaunchError(
            f"--deepspeed: there is no file {path}",
            hint=f"give one of {names}, or the path of a DeepSpeed JSON file",
        ) from None
    except OSError as error:
        raise LaunchError(f"--deepspeed: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LaunchError(f"--deepspeed: {path} is not UTF-8 text: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise LaunchError(f"--deepspeed: {path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise LaunchError(f"--deepspeed: {path} holds {type(values).__name__}, not a JSON object")
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise LaunchError(f"--deepspeed: {path}: zero_optimization.stage must be 0, 1, 2 or 3")
    return values


def zero_stage(values: Mapping[str, Any]) -> int:
    return int(values.get("zero_optimization", {}).get("stage", 0))


def _lookup(values: Mapping[str, Any], dotted_name: str) -> Any:
    """The value under a dotted name; None where it is missing."""
    current: Any = values
    for name in dotted_name.split("."):
        if not isinstance(current, Mapping) or name not in current:
            return None
        current = current[name]
    return current


def conflicts(values: Mapping[str, Any], config: TrainingOptions, mixed_precision: str) -> list[str]:
    """Values of a user's file that say something else than the options; ``auto`` and missing values never
    do."""
    expected: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (config.batch_size, "--batch-size"),
        "gradient_accumulation_steps": (config.gradient_accumulation_steps, "--gradient-accumulation-steps"),
        "gradient_clipping": (config.max_grad_norm, "--max-grad-norm"),
        "bf16.enabled": (mixed_precision == "bf16", f"--mixed-precision {mixed_precision}, which makes it"),
        "fp16.enabled": (mixed_precision == "fp16", f"--mixed-precision {mixed_precision}, which makes it"),
        "optimizer.params.lr": (config.learning_rate, "--learning-rate"),
        "optimizer.params.weight_decay": (config.weight_decay, "--weight-decay"),
        "scheduler.params.warmup_max_lr": (config.learning_rate, "--learning-rate"),
    }
    problems = []
    for name, (value, option) in expected.items():
        found = _lookup(values, name)
        if found not in (None, "auto", value):
            problems.append(f"{name} is {json.dumps(found)}, but {option} {json.dumps(value)}")
    if _lookup(values, "train_batch_size") not in (None, "auto"):
        problems.append(
            'train_batch_size is fixed, but it follows from the options and the processes: write "auto"'
        )
    return problems


def deepspeed_config(config: TrainingOptions, plan: "LaunchPlan") -> dict[str, Any]:
    """The DeepSpeed configuration, for ``TrainingArguments(deepspeed=...)``.

    ``auto`` values are filled by the Trainer from its arguments; the optimizer and the schedule are the
    Trainer's. A user's file passes through as it is: the plan was made after a check of it against the options.

    Raises:
        LaunchError: the plan has no DeepSpeed, or the user's file cannot be read any more.
    """
    if plan.deepspeed is None or plan.zero_stage is None:
        raise LaunchError("this run does not use DeepSpeed", hint="--deepspeed zero2")
    if plan.deepspeed not in STAGES:
        return read_file(Path(plan.deepspeed))
    zero: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage >= 2:
        zero |= {
            "overlap_comm": plan.device == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
        }
    if plan.zero_stage == 3:
        # With gathering on saving, the weights that are written are whole, not one process's share.
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        # The Trainer's own optimizer (--optim) is kept with any stage.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _search_path(environ: Mapping[str, str]) -> str:
    """PATH with the folder of this Python first: there pip puts ninja, activated or not."""
    return os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])


def environment(device: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables for a process that uses DeepSpeed.

    The folder for the operators that it builds is the user's choice (TORCH_EXTENSIONS_DIR), else one of
    meldkit's.
    """
    built = environ.get("TORCH_EXTENSIONS_DIR") or str(cache_folder(environ) / "torch_extensions")
    variables = {"PATH": _search_path(environ), "TORCH_EXTENSIONS_DIR": built}
    if device == "cpu":
        variables["DS_ACCELERATOR"] = "cpu"
    return variables
