"""The torch side of a launch plan: the process group, the Trainer's arguments that follow from it, and the
checks.

    prepare_world(plan)                    before anything is built: variables, threads, process group, check
    training_arguments(plan, config)       what the plan decides of TrainingArguments
    assert_world(plan, accelerator)        after the Trainer is built: it really works in that world
    close_world()                          at the end

Why DeepSpeed needs more than arguments (accelerate 1.15, transformers 5.17): on a machine without a GPU
accelerate finds no backend for DeepSpeed and takes each process for a world of its own, and
TrainingArguments hands no backend on. ``PartialState(backend="gloo")`` before them, with
``use_configured_state``, is the documented way in. And any sign of ``use_cpu`` makes accelerate leave
DeepSpeed out without a word, so the CPU is chosen by DS_ACCELERATOR there.
"""

import os
import socket
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from toolkit.config.options import TrainingOptions
from toolkit.errors import WorldSizeError
from toolkit.launch.deepspeed import deepspeed_config
from toolkit.launch.plan import LaunchPlan

LONGEST_WAIT = timedelta(hours=2)
"""How long processes wait for each other. Rank 0 may tokenise for longer than NCCL's ten minutes while the others
wait; a process that dies is noticed by the launcher, not by this."""


def prepare_world(plan: LaunchPlan) -> None:
    """Make this process a member of the plan's world. Call once, before TrainingArguments are built.

    Raises:
        WorldSizeError: the processes or devices are not those of the plan.
    """
    _set_environment(plan)
    torch.set_num_threads(plan.threads_per_process)
    if plan.deepspeed is not None:
        if "LOCAL_RANK" not in os.environ:
            _become_a_world_of_one()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        backend = {"backend": "gloo"} if plan.device == "cpu" else {}
        PartialState(False, timeout=LONGEST_WAIT, **backend)
    else:
        PartialState(cpu=plan.device == "cpu", timeout=LONGEST_WAIT)
    assert_world(plan)


def _set_environment(plan: LaunchPlan) -> None:
    """Set what the libraries read. The launcher has done so for the processes that it started."""
    variables = plan.environment()
    del variables["OMP_NUM_THREADS"]  # torch has read it; set_num_threads takes its place
    if plan.device == "cpu":
        # use_cpu decides here; a process that is not started anew may need its GPUs later.
        del variables["CUDA_VISIBLE_DEVICES"]
    elif torch.cuda.is_initialized() and os.environ.get("CUDA_VISIBLE_DEVICES") != ",".join(plan.gpus):
        raise WorldSizeError(
            f"CUDA is in use already, so that the choice of GPU {', '.join(plan.gpus)} comes too late",
            hint=f"start with CUDA_VISIBLE_DEVICES={variables['CUDA_VISIBLE_DEVICES']}",
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        # accelerate launch left its own; the plan has decided which one holds.
        variables["ACCELERATE_MIXED_PRECISION"] = plan.mixed_precision
    os.environ.update(variables)
    if plan.deepspeed is not None:
        os.environ.pop("ACCELERATE_USE_CPU", None)
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _become_a_world_of_one() -> None:
    """DeepSpeed wants a process group for one process too, and `accelerate launch` gives that no rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def training_arguments(plan: LaunchPlan, config: TrainingOptions) -> dict[str, Any]:
    """The arguments of TrainingArguments that the plan decides; they hold after :func:`prepare_world`."""
    arguments: dict[str, Any] = {
        # Both are always given: SFTConfig trains in bf16 where nobody says otherwise.
        "bf16": plan.mixed_precision == "bf16",
        "fp16": plan.mixed_precision == "fp16",
        "use_cpu": plan.device == "cpu" and plan.deepspeed is None,
        "dataloader_pin_memory": plan.device == "cuda",
    }
    if plan.device == "cuda":
        arguments["accelerator_config"] = {
            "non_blocking": True
        }  # from pinned memory, while the GPU still computes
    if plan.deepspeed is not None:
        arguments["deepspeed"] = deepspeed_config(config, plan)
        arguments.setdefault("accelerator_config", {})["use_configured_state"] = True
    elif plan.num_processes > 1:
        arguments["ddp_backend"] = "gloo" if plan.device == "cpu" else "nccl"
        # Every trained weight is used in every step; searching for others costs time and forbids
        # checkpointing.
        arguments["ddp_find_unused_parameters"] = False
    return arguments


def assert_world(plan: LaunchPlan, accelerator: Accelerator | None = None) -> None:
    """Compare the world in which this process works with the plan.

    Args:
        accelerator: the Trainer's, once there is one; without it the process state is looked at.

    Raises:
        WorldSizeError: another number of processes, another device, or DeepSpeed that was asked for and is
            not there.
    """
    if accelerator is None and not PartialState().initialized:
        raise WorldSizeError("the world was not prepared", hint="call prepare_world(plan) first")
    state: Any = accelerator.state if accelerator is not None else PartialState()
    wrong = []
    if state.num_processes != plan.num_processes:
        wrong.append(
            f"{plan.num_processes} processes were asked for, and its world has {state.num_processes}"
        )
    if state.device.type != plan.device:
        wrong.append(f"the device is {state.device}, not {plan.device}")
    elif plan.device == "cuda" and torch.cuda.device_count() != len(plan.gpus):
        wrong.append(f"torch sees {torch.cuda.device_count()} GPUs, the plan has {len(plan.gpus)}")
    has_deepspeed = state.distributed_type == DistributedType.DEEPSPEED
    if has_deepspeed and plan.deepspeed is None:
        wrong.append("DeepSpeed is on without being asked for")
    if not has_deepspeed and plan.deepspeed is not None:
        wrong.append(f"DeepSpeed ({plan.deepspeed}) was asked for and is off")
    if wrong:
        rank = os.environ.get("RANK", "0")
        raise WorldSizeError(
            f"rank {rank} is not in the world that the plan asked for: {'; '.join(wrong)}",
            hint="start with `meldkit train`, which launches the processes itself, and look for WORLD_SIZE, "
            "LOCAL_RANK and ACCELERATE_* in the environment",
        )


def close_world() -> None:
    """Leave the process group, if there is one (NCCL warns about a process that ends in it)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
