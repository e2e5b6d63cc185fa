import dataclasses
import subprocess
import sys

import pytest

from toolkit.config import trainer_fields
from toolkit.config.recipes import CentralizedConfig
from toolkit.config.trainer_fields import GOVERNED, SCHEDULES_BY_METRIC, SET_BY_MELDKIT


def test_the_fields_are_those_of_the_imported_classes():
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    for task, config in (
        ("causal-lm", trl.SFTConfig),
        ("sequence-classification", transformers.TrainingArguments),
    ):
        init = {f.name for f in dataclasses.fields(config) if f.init}
        assert init <= trainer_fields.trainer_fields(task)
        assert trainer_fields.trainer_fields(task) - init <= {f.name for f in dataclasses.fields(config)} | {
            "local_rank"
        }


def test_the_names_of_enumerations_are_those_of_the_imported_classes():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    names = trainer_fields.enum_values("transformers.trainer_utils", "SchedulerType")
    assert set(names) == {member.value for member in SchedulerType}
    names = trainer_fields.enum_values("transformers.training_args", "OptimizerNames")
    assert set(names) == {member.value for member in OptimizerNames}


def test_looking_does_not_import():
    code = (
        "import sys\n"
        "from toolkit.config.trainer_fields import enum_values, trainer_fields\n"
        "assert 'neftune_noise_alpha' in trainer_fields('causal-lm')\n"
        "assert enum_values('transformers.trainer_utils', 'SchedulerType')\n"
        "print(sorted({'torch', 'transformers', 'trl'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_what_governs_an_argument_is_an_option():
    assert set(GOVERNED.values()) <= CentralizedConfig.model_fields.keys()
    assert not GOVERNED.keys() & SET_BY_MELDKIT


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rate=1", "is governed by the option 'learning_rate'; use that"),
        ("per_device_train_batch_size=1", "is governed by the option 'batch_size'; use that"),
        ("max_length=1", "is governed by the option 'max_length'; use that"),
        ("hub_token=hf_x", "is a secret, and options are recorded"),
        ("remove_unused_columns=true", "is not passed through: the data has the columns"),
        ("save_only_model=true", "a checkpoint cannot be resumed from"),
        ("ignore_data_skip=true", "a resumed run would train on rows a second time"),
        ("auto_find_batch_size=true", "batch_size is recorded and must hold"),
        ("eval_on_start=true", "there is always an evaluation before training"),
        ("push_to_hub=true", "a run sends nothing anywhere"),
        ("dataloader_drop_last=true", "every row is trained in every epoch"),
        ("logging_nan_inf_filter=true", "it hides a loss that is not finite"),
        ("accelerator_config=x.json", "how batches are made and shared out is fixed"),
        ("fsdp=full_shard", "the option 'deepspeed' shards"),
        ("fsdp_config=x.json", "the option 'deepspeed' shards"),
        ("parallelism_config=x", "the launch options decide the processes"),
        ("ddp_backend=mpi", "the launch options decide the device"),
        (
            "neftune_alpha=5",
            "the installed SFTConfig has no such argument; did you mean 'neftune_noise_alpha'?",
        ),
        ("evaluation_strategy=epoch", "no such argument; it is called 'eval_every' here"),
        ("max_seq_length=5", "no such argument; it is called 'max_length' here"),
        ("fp16_opt_level=O1", "no such argument; it is called 'mixed_precision' here"),
        ("include_inputs_for_metrics=true", "Hugging Face calls it include_for_metrics now"),
    ],
)
def test_arguments_that_are_not_passed_through(problems, argument, message):
    found = problems("--trainer-args", argument)
    assert len(found) == 1
    assert found[0].startswith(f"--trainer-args {argument.split('=')[0]}: ")
    assert message in found[0]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES_BY_METRIC))
def test_a_schedule_that_waits_for_evaluations_is_refused(problems, schedule):
    [problem] = problems("--lr-scheduler", schedule)
    assert problem.startswith(f"--lr-scheduler: '{schedule}' follows evaluations inside the Trainer")


def test_what_changes_no_contract_is_passed_through(loaded):
    given = ["--trainer-args", "use_liger_kernel=true", "--trainer-args", "neftune_noise_alpha=5"]
    assert loaded(*given).config.trainer_args == {"use_liger_kernel": True, "neftune_noise_alpha": 5}


def test_each_task_has_its_class(loaded, problems):
    assert loaded("--trainer-args", "activation_offloading=true").config.trainer_args == {
        "activation_offloading": True
    }
    found = problems("--task", "sequence-classification", "--trainer-args", "activation_offloading=true")
    assert "the installed TrainingArguments has no such argument" in found[0]


def test_an_argument_cannot_be_checked_without_the_package(problems, monkeypatch):
    monkeypatch.setitem(trainer_fields.TRAINER_CLASSES, "causal-lm", ("trl.trainer.nowhere", "SFTConfig"))
    trainer_fields.trainer_fields.cache_clear()
    try:
        assert (
            "cannot be checked against the installed trl" in problems("--trainer-args", "adam_beta2=0.9")[0]
        )
    finally:
        trainer_fields.trainer_fields.cache_clear()
