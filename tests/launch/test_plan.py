"""The launch plan: what is decided on which machine, in which world, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.options import LaunchOptions, QuantizationOptions, TrainingOptions
from toolkit.errors import LaunchError, MissingDependencyError
from toolkit.launch import deepspeed
from toolkit.launch import plan as plan_module
from toolkit.launch.plan import LaunchPlan, is_launched, resolve_plan

Machine = Callable[..., list[Any]]


class Config(TrainingOptions, QuantizationOptions, LaunchOptions):
    """What the launch layer reads of a recipe's configuration."""


def plan_for(environ: dict[str, str] | None = None, **options: Any) -> LaunchPlan:
    return resolve_plan(Config(**options), environ or {})


def world(num_processes: int, **more: str) -> dict[str, str]:
    """What torchrun leaves in the environment of rank 0."""
    number = str(num_processes)
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, **more}


def notes_of(plan: LaunchPlan) -> str:
    return "\n".join(plan.notes)


def test_a_machine_without_gpus_trains_on_the_cpu_in_one_process(machine: Machine) -> None:
    machine(0)
    plan = plan_for()
    assert (plan.device, plan.gpus, plan.num_processes, plan.mixed_precision) == ("cpu", (), 1, "no")
    assert plan.threads_per_process == 8
    assert not plan.needs_launcher


def test_the_guides_gpu_0_runs_on_a_machine_without_gpus(machine: Machine) -> None:
    machine(0)
    plan = plan_for(gpu="0")
    assert plan.device == "cpu"
    assert "no NVIDIA GPU here; --gpu 0 is ignored, training on the CPU" in notes_of(plan)
    assert plan.as_dict() == plan_for().as_dict()


def test_every_gpu_gets_a_process_unless_told_otherwise(machine: Machine) -> None:
    machine(4)
    assert plan_for().gpus == ("0", "1", "2", "3")
    assert plan_for().num_processes == 4
    assert plan_for(gpu="1,3").gpus == ("1", "3")
    assert plan_for(num_processes=2).gpus == ("0", "1")
    assert plan_for({"CUDA_VISIBLE_DEVICES": "2,1"}).gpus == ("2", "1")
    assert plan_for({"CUDA_VISIBLE_DEVICES": ""}).device == "cpu"
    assert plan_for(cpu=True).device == "cpu"
    assert plan_for(gpu="1").environment()["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(machine: Machine) -> None:
    machine(2)
    with pytest.raises(
        LaunchError, match=r"--gpu 7: there is no GPU '7' in this machine; it has the GPUs 0, 1"
    ):
        plan_for(gpu="7")
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES=1 hides GPU 0"):
        plan_for({"CUDA_VISIBLE_DEVICES": "1"}, gpu="0")
    with pytest.raises(LaunchError, match="3 processes, but 2 GPUs to use"):
        plan_for(num_processes=3)


@pytest.mark.usefixtures("cut_machine")
def test_slices_of_a_gpu_are_numbered_and_used_one_at_a_time() -> None:
    plan = plan_for(gpu="0")
    assert (plan.gpus, plan.num_processes) == (("MIG-aaa",), 1)
    assert plan_for(gpu="1").environment()["CUDA_VISIBLE_DEVICES"] == "MIG-abb"
    plan = plan_for()
    assert (plan.gpus, plan.num_processes) == (("MIG-aaa",), 1)
    assert "one MIG slice only" in notes_of(plan)
    # A process that was started with the plan's environment makes the same plan.
    assert plan_for(plan.environment(), gpu="0").as_dict() == plan.as_dict()
    with pytest.raises(LaunchError, match="one MIG slice only"):
        plan_for(gpu="0,1")
    with pytest.raises(LaunchError, match="it has the GPUs 0, 1"):
        plan_for(gpu="2")


def test_the_plan_as_values_is_all_but_the_notes(machine: Machine) -> None:
    machine(2)
    plan = plan_for()
    assert plan.as_dict().keys() == {field.name for field in dataclasses.fields(plan)} - {"notes"}
    assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict()


def test_a_gpu_with_a_torch_for_cpus_is_said_clearly(machine: Machine) -> None:
    machine(1, build="2.13.0+cpu")
    with pytest.raises(
        LaunchError, match=r"has a GPU \(NVIDIA Test\), but torch 2.13.0\+cpu was built for CPUs"
    ):
        plan_for()
    assert plan_for(cpu=True).device == "cpu"


@pytest.mark.parametrize(
    ("num_gpus", "capability", "asked", "expected"),
    [
        (0, (9, 0), "auto", "no"),
        (0, (9, 0), "bf16", "bf16"),
        (1, (9, 0), "auto", "bf16"),
        (1, (8, 0), "auto", "bf16"),
        (1, (7, 5), "auto", "fp16"),
        (1, (9, 0), "no", "no"),
        (1, (9, 0), "fp16", "fp16"),
    ],
)
def test_mixed_precision(
    machine: Machine, num_gpus: int, capability: tuple[int, int], asked: str, expected: str
) -> None:
    machine(num_gpus, capability=capability)
    assert plan_for(mixed_precision=asked).mixed_precision == expected


def test_precision_that_the_device_cannot_do_is_refused(machine: Machine) -> None:
    machine(0)
    with pytest.raises(LaunchError, match="fp16 needs a GPU"):
        plan_for(mixed_precision="fp16")
    machine(1, capability=(7, 5))
    with pytest.raises(LaunchError, match=r"bf16 is slow emulation on GPU 0"):
        plan_for(mixed_precision="bf16")


def test_only_a_launcher_makes_a_launched_process() -> None:
    assert not is_launched({})
    assert not is_launched(
        {"WORLD_SIZE": "4", "MASTER_ADDR": "x"}
    )  # cluster software sets these for a container
    assert is_launched(world(2))
    assert is_launched({"ACCELERATE_MIXED_PRECISION": "no"})  # accelerate launch with one process


@pytest.mark.parametrize("num_gpus", [0, 2])
@pytest.mark.parametrize(
    "environ",
    [
        world(2, OMP_NUM_THREADS="1"),
        world(2, OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_DEEPSPEED="false"),
        world(2, OMP_NUM_THREADS="4", MELDKIT_RANK_FOLDER="/somewhere", ACCELERATE_MIXED_PRECISION="no"),
    ],
    ids=["torchrun", "accelerate", "ours"],
)
def test_the_same_request_gives_the_same_plan_however_it_is_started(
    machine: Machine, num_gpus: int, environ: dict[str, str]
) -> None:
    machine(num_gpus)
    direct = plan_for(num_processes=2)
    assert plan_for(environ, num_processes=2).as_dict() == direct.as_dict()
    assert plan_for(environ).as_dict() == direct.as_dict()
    assert json.loads(json.dumps(direct.as_dict())) == direct.as_dict()


def test_another_world_than_the_options_ask_for_is_refused(machine: Machine) -> None:
    machine(0)
    with pytest.raises(
        LaunchError, match=r"--num-processes 4, but torchrun started 2 processes \(WORLD_SIZE=2\)"
    ):
        plan_for(world(2), num_processes=4)
    with pytest.raises(LaunchError, match="--num-processes 2, but accelerate launch started 1 process"):
        plan_for({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}, num_processes=2)
    with pytest.raises(LaunchError, match="contradicts itself: RANK=3 of WORLD_SIZE=2"):
        plan_for({**world(2), "RANK": "3"})
    with pytest.raises(LaunchError, match="WORLD_SIZE is 'two', not a number"):
        plan_for({**world(2), "WORLD_SIZE": "two"})
    with pytest.raises(LaunchError, match="--use_fsdp is not supported"):
        plan_for(world(2, ACCELERATE_USE_FSDP="true"))
    machine(2)
    with pytest.raises(LaunchError, match="--gpu 0, but accelerate launch was told to use the CPU"):
        plan_for({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}, gpu="0")


def test_two_machines_share_the_processes(machine: Machine) -> None:
    machine(4)
    plan = plan_for({**world(8), "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"})
    assert (plan.num_processes, plan.num_machines, plan.gpus) == (8, 2, ("0", "1", "2", "3"))


def test_who_won_between_accelerates_precision_and_ours(machine: Machine) -> None:
    machine(1)
    told_fp16 = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    assert plan_for(told_fp16).mixed_precision == "fp16"
    assert "mixed precision fp16: accelerate launch was told so" in notes_of(plan_for(told_fp16))
    plan = plan_for(told_fp16, mixed_precision="no")
    assert plan.mixed_precision == "no"
    assert "--mixed-precision no wins over fp16, which accelerate launch was told" in notes_of(plan)
    # accelerate says "no" also when nobody said anything
    assert plan_for({"ACCELERATE_MIXED_PRECISION": "no"}).mixed_precision == "bf16"


def test_threads_are_shared_out_and_the_users_number_holds(machine: Machine) -> None:
    machine(0, num_cpus=8)
    assert plan_for(num_processes=2).threads_per_process == 4
    assert plan_for(num_processes=16).threads_per_process == 1
    assert plan_for({"OMP_NUM_THREADS": "3"}, num_processes=2).threads_per_process == 3
    assert plan_for({"OMP_NUM_THREADS": "none"}).threads_per_process == 8


def test_deepspeed_needs_a_launcher_and_keeps_use_cpu_away(machine: Machine) -> None:
    machine(0)
    plan = plan_for(deepspeed="zero2")
    assert (plan.deepspeed, plan.zero_stage, plan.needs_launcher) == ("zero2", 2, True)
    assert plan.environment()["DS_ACCELERATOR"] == "cpu"
    assert "ACCELERATE_USE_CPU" not in plan.environment()
    assert plan_for().environment()["ACCELERATE_USE_CPU"] == "true"


def test_deepspeed_of_accelerate_launch_is_adopted(machine: Machine) -> None:
    machine(0)
    environ = world(2, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    assert plan_for(environ).as_dict() == plan_for(deepspeed="zero3", num_processes=2).as_dict()
    plan = plan_for(environ, deepspeed="zero1")
    assert plan.zero_stage == 1
    assert "--deepspeed zero1 wins over zero3, which torchrun was told" in notes_of(plan)


def test_what_is_not_installed_is_said_before_anything_starts(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0)
    monkeypatch.setattr(deepspeed, "is_installed", lambda module: False)
    monkeypatch.setattr(plan_module, "is_installed", lambda module: False)
    with pytest.raises(
        MissingDependencyError, match="--deepspeed zero2 needs the package deepspeed"
    ) as error:
        plan_for(deepspeed="zero2")
    assert error.value.exit_status == 2
    assert 'pip install "meldkit[deepspeed]"' in str(error.value)
    with pytest.raises(MissingDependencyError, match="--load-in-4bit needs the package bitsandbytes"):
        plan_for(load_in_4bit=True)
    with pytest.raises(MissingDependencyError, match="--load-in-8bit needs the package bitsandbytes"):
        plan_for(load_in_8bit=True)


def test_deepspeed_on_a_cpu_needs_its_build_tools(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"needs c\+\+ on the PATH"):
        plan_for(deepspeed="zero2")
    with pytest.raises(LaunchError, match="bf16 needs a GPU"):
        plan_for(deepspeed="zero2", mixed_precision="bf16")


def test_quantization_with_zero3(machine: Machine) -> None:
    machine(1)
    assert plan_for(load_in_4bit=True).quant_storage is None
    assert plan_for(load_in_4bit=True, deepspeed="zero2").quant_storage is None
    assert plan_for(load_in_4bit=True, deepspeed="zero3").quant_storage == "bfloat16"
    with pytest.raises(LaunchError, match="--load-in-8bit does not work with ZeRO-3"):
        plan_for(load_in_8bit=True, deepspeed="zero3")


def test_planning_imports_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "import toolkit.launch.launcher, toolkit.launch.agent, toolkit.launch.rank\n"
        "from toolkit.config.options import LaunchOptions\n"
        "from toolkit.launch.plan import resolve_plan\n"
        "resolve_plan(LaunchOptions(deepspeed='zero3', cpu=True))\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'datasets', 'deepspeed'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("options", "cpu_has_bf16", "expected"),
    [
        ({}, True, "bf16"),
        ({}, False, "no"),
        ({"throughput": "off"}, True, "no"),
        ({"task": "sequence-classification"}, True, "no"),
        ({"deepspeed": "zero2"}, True, "no"),
        ({"mixed_precision": "no"}, True, "no"),
        ({"mixed_precision": "bf16"}, False, "bf16"),
    ],
)
def test_a_cpu_computes_a_language_model_in_bf16_where_it_can(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, options: dict, cpu_has_bf16: bool, expected: str
) -> None:
    from toolkit.config.recipes import CentralizedConfig
    from toolkit.launch import devices

    machine(0)
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: cpu_has_bf16)
    config = CentralizedConfig.model_validate({"model": "m", "data": "d", "output_dir": "o"} | options)
    plan = resolve_plan(config, {})
    assert plan.mixed_precision == expected
    assert f"mixed precision {expected}: " in notes_of(plan)
