"""The torch side of a plan, in real processes: data parallel and DeepSpeed on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.options import LaunchOptions, TrainingOptions
from toolkit.errors import WorldSizeError
from toolkit.launch.launcher import run
from toolkit.launch.plan import resolve_plan
from toolkit.training.world import assert_world, training_arguments


class Config(TrainingOptions, LaunchOptions):
    """What the launch layer reads of a recipe's configuration."""


def config_with(**options: Any) -> Config:
    return Config(cpu=True, gradient_accumulation_steps=1, **options)


def train(config: Config, environ: dict[str, str], folder: Path) -> dict[str, Any]:
    """Train the tiny model under our launcher and return what rank 0 saw."""
    options_path, result_path = folder / "options.json", folder / "result.json"
    options_path.write_text(config.model_dump_json())
    plan = resolve_plan(config, environ)
    assert run(plan, ["trainer_probe", str(options_path), str(result_path)], environ) == 0
    result = json.loads(result_path.read_text())
    assert result["plan"] == plan.as_dict()
    assert result["num_processes"] == plan.num_processes
    assert result["num_threads"] == plan.threads_per_process
    return result


@pytest.fixture
def deepspeed_environment(probe_environment: dict[str, str]) -> dict[str, str]:
    """The operators that DeepSpeed builds (a minute) are kept between tests and sessions."""
    del probe_environment["MELDKIT_CACHE"]
    if "MELDKIT_CACHE" in os.environ:
        probe_environment["MELDKIT_CACHE"] = os.environ["MELDKIT_CACHE"]
    return probe_environment


@pytest.mark.slow
def test_two_processes_train_like_one(probe_environment: dict[str, str], tmp_path: Path) -> None:
    two = train(config_with(num_processes=2, batch_size=1), probe_environment, tmp_path)
    assert two["distributed_type"] == "MULTI_CPU"
    # The same two rows a step, in one process that no launcher has started.
    options_path, result_path = tmp_path / "one.json", tmp_path / "one-result.json"
    options_path.write_text(config_with(batch_size=2).model_dump_json())
    command = [sys.executable, "-m", "trainer_probe", str(options_path), str(result_path)]
    subprocess.run(command, env=probe_environment, check=True, capture_output=True)
    one = json.loads(result_path.read_text())
    assert one["distributed_type"] == "NO"
    # fp32 on both sides; the mean over two ranks adds in another order than the mean over two rows.
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["losses"][0] != two["losses"][-1]


@pytest.fixture(scope="module")
def losses_of_data_parallel() -> dict[str, list[float]]:
    """Filled by the first test that needs it: one run of plain data parallel serves all comparisons."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_like_data_parallel(
    deepspeed_environment: dict[str, str],
    tmp_path: Path,
    losses_of_data_parallel: dict[str, list[float]],
    stage: int,
    num_processes: int,
) -> None:
    if not losses_of_data_parallel:
        losses_of_data_parallel |= train(config_with(num_processes=2), deepspeed_environment, tmp_path)
    config = config_with(
        num_processes=num_processes,
        batch_size=2 // num_processes,
        deepspeed=f"zero{stage}",
        max_grad_norm=1.0,
    )
    sharded = train(config, deepspeed_environment, tmp_path)
    assert sharded["distributed_type"] == "DEEPSPEED"
    assert sharded["losses"] == pytest.approx(losses_of_data_parallel["losses"], abs=1e-5)
    # ZeRO-3 gathers the weights: the file is whole, not one process's share.
    from safetensors import safe_open

    with safe_open(tmp_path / "result.json.model" / "model.safetensors", "pt") as weights:
        assert list(weights.get_slice("model.embed_tokens.weight").get_shape()) == [64, 16]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher_arguments",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
        ["accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2", "--main_process_port", "0"],
    ],
    ids=["torchrun", "accelerate", "accelerate with DeepSpeed"],
)
def test_other_launchers_lead_to_the_same_plan(
    deepspeed_environment: dict[str, str], tmp_path: Path, launcher_arguments: list[str]
) -> None:
    options_path, result_path = tmp_path / "options.json", tmp_path / "result.json"
    options_path.write_text(config_with().model_dump_json())
    probe = ["-m", "trainer_probe", str(options_path), str(result_path)]
    command = [sys.executable, "-m", *launcher_arguments, *probe]
    environ = {name: value for name, value in deepspeed_environment.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(command, env=environ, check=True, capture_output=True)
    result = json.loads(result_path.read_text())
    deepspeed = "zero2" if "--use_deepspeed" in launcher_arguments else None
    request = config_with(num_processes=2, deepspeed=deepspeed)
    assert result["plan"] == resolve_plan(request, environ).as_dict()
    assert result["num_processes"] == 2


def test_a_world_that_is_smaller_than_the_plan_is_an_error() -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    assert_world(resolve_plan(config_with(), {}))
    with pytest.raises(WorldSizeError, match="2 processes were asked for, and its world has 1"):
        assert_world(resolve_plan(config_with(num_processes=2), {}))
    with pytest.raises(WorldSizeError, match=r"DeepSpeed \(zero2\) was asked for and is off"):
        assert_world(resolve_plan(config_with(deepspeed="zero2"), {}))


def test_arguments_of_the_trainer() -> None:
    plain = config_with()
    arguments = training_arguments(resolve_plan(plain, {}), plain)
    assert (arguments["use_cpu"], arguments["bf16"], arguments["fp16"]) == (True, False, False)
    assert "ddp_backend" not in arguments
    half = config_with(mixed_precision="bf16", num_processes=2)
    arguments = training_arguments(resolve_plan(half, {}), half)
    assert (arguments["bf16"], arguments["ddp_backend"]) == (True, "gloo")
    sharded = config_with(deepspeed="zero3")
    arguments = training_arguments(resolve_plan(sharded, {}), sharded)
    assert arguments["use_cpu"] is False  # anything else switches DeepSpeed off without a word
    assert arguments["deepspeed"]["zero_optimization"]["stage"] == 3
