"""What the installed classes of arguments refuse is wrong input, with the option that it came from."""

import pytest

from toolkit.config.recipes import CentralizedConfig
from toolkit.errors import ConfigError
from toolkit.training.arguments import build_arguments


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "lr_scheduler: "),
        ({"trainer_args": {"debug": "nonsense"}}, "trainer_args: "),
        ({"trainer_args": {"torch_compile_mode": 3, "nonsense": 1}}, "trainer_args: "),
    ],
)
def test_what_the_trainer_refuses_is_wrong_input(tmp_path, task, options, named):
    config = CentralizedConfig.model_construct(
        **{
            name: field.get_default(call_default_factory=True)
            for name, field in CentralizedConfig.model_fields.items()
        }
        | {"task": task}
        | options
    )
    with pytest.raises(ConfigError) as caught:
        build_arguments(config, {"use_cpu": True, "bf16": False, "fp16": False}, tmp_path, seed=3)
    assert caught.value.exit_status == 2
    assert named + "the installed " in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "argument", "expected"),
    [
        ("gradient_checkpointing", True, "gradient_checkpointing", True),
        ("gradient_checkpointing", False, "gradient_checkpointing", False),
        ("dataloader_workers", 2, "dataloader_num_workers", 2),
        ("eval_batch_size", 5, "per_device_eval_batch_size", 5),
        ("max_steps", 7, "max_steps", 7),
        ("max_steps", None, "max_steps", -1),
        ("max_epochs", 1.5, "num_train_epochs", 1.5),
        ("warmup_ratio", 0.25, "warmup_steps", 0.25),
        ("max_grad_norm", 0.5, "max_grad_norm", 0.5),
        ("optim", "sgd", "optim", "sgd"),
    ],
)
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_options_reach_the_arguments(tmp_path, task, option, value, argument, expected):
    config = CentralizedConfig(model="m", data="d", output_dir=tmp_path, task=task, **{option: value})
    arguments = build_arguments(config, {"use_cpu": True, "bf16": False, "fp16": False}, tmp_path, seed=3)
    assert getattr(arguments, argument) == expected


def test_a_head_with_an_adapter_is_trained_by_the_whole_loss(tmp_path):
    """TRL's chunked loss reads the head's weight past its adapter."""
    world = {"use_cpu": True, "bf16": False, "fp16": False}
    plain = CentralizedConfig(model="m", data="d", output_dir=tmp_path)
    head = CentralizedConfig(model="m", data="d", output_dir=tmp_path, lora_target_modules=["lm_head"])
    assert build_arguments(plain, world, tmp_path, seed=3).loss_type == "chunked_nll"
    assert build_arguments(head, world, tmp_path, seed=3).loss_type == "nll"


def test_the_seed_is_that_of_the_participant(tmp_path):
    config = CentralizedConfig(model="m", data="d", output_dir=tmp_path, seed=5)
    arguments = build_arguments(config, {"use_cpu": True, "bf16": False, "fp16": False}, tmp_path, seed=3)
    assert (arguments.seed, arguments.data_seed) == (3, 3)
