"""The DeepSpeed configuration: ours, and a user's file."""

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.options import LaunchOptions, TrainingOptions
from toolkit.errors import LaunchError
from toolkit.launch.deepspeed import conflicts, deepspeed_config, environment, read_file
from toolkit.launch.plan import resolve_plan


class Config(TrainingOptions, LaunchOptions):
    """What the launch layer reads of a recipe's configuration."""


def config_with(source: str | Path | None, **options: Any) -> Config:
    return Config(deepspeed=None if source is None else str(source), cpu=True, **options)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_our_configuration_leaves_the_values_to_the_trainer(stage: int) -> None:
    config = config_with(f"zero{stage}")
    values = deepspeed_config(config, resolve_plan(config, {}))
    assert values["zero_optimization"]["stage"] == stage
    for name in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "gradient_clipping"):
        assert values[name] == "auto"
    assert "optimizer" not in values
    assert values["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False) == (stage == 3)
    assert not conflicts(values, config, "no")


def test_a_users_file_passes_through_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    values = {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0, "wall_clock_breakdown": True}
    path.write_text(json.dumps(values))
    config = config_with(path)
    plan = resolve_plan(config, {})
    assert (plan.deepspeed, plan.zero_stage) == (str(path), 3)
    assert deepspeed_config(config, plan) == values


def test_a_file_that_contradicts_the_options_is_refused_with_every_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    values = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "train_batch_size": 64,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": "auto"}},
    }
    path.write_text(json.dumps(values))
    with pytest.raises(LaunchError) as error:
        resolve_plan(config_with(path), {})
    lines = str(error.value).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  - ")] == [
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
        "bf16.enabled",
        "optimizer.params.lr",
        "train_batch_size",
    ]
    assert "train_micro_batch_size_per_gpu is 4, but --batch-size 1" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ('{\n  "zero_optimization": {,}\n}', r"mine\.json:2: not valid JSON"),
        ("[]", "holds list, not a JSON object"),
        ('{"zero_optimization": {"stage": 4}}', "stage must be 0, 1, 2 or 3"),
        ('{"zero_optimization": 2}', "stage must be 0, 1, 2 or 3"),
        ("", r"mine\.json:1: not valid JSON"),
    ],
)
def test_broken_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LaunchError, match=message):
        read_file(path)


def test_a_binary_file_and_a_folder_are_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LaunchError, match="is not UTF-8"):
        read_file(tmp_path / "mine.bin")
    with pytest.raises(LaunchError, match="there is no file"):
        read_file(tmp_path)


def test_without_deepspeed_there_is_no_configuration() -> None:
    config = config_with(None)
    with pytest.raises(LaunchError, match="does not use DeepSpeed"):
        deepspeed_config(config, resolve_plan(config, {}))


def test_operators_are_built_where_the_user_says(tmp_path: Path) -> None:
    assert environment("cpu", {"TORCH_EXTENSIONS_DIR": "/mine"})["TORCH_EXTENSIONS_DIR"] == "/mine"
    built = environment("cpu", {"MELDKIT_CACHE": str(tmp_path)})["TORCH_EXTENSIONS_DIR"]
    assert built == str(tmp_path / "torch_extensions")
    assert "DS_ACCELERATOR" not in environment("cuda", {})
