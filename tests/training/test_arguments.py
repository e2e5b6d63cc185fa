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
        build_arguments(config, {"use_cpu": True, "bf16": False, "fp16": False}, tmp_path)
    assert caught.value.exit_status == 2
    assert named + "the installed " in str(caught.value)
