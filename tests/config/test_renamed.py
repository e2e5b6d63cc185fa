import pytest

from toolkit.config.recipes import CentralizedConfig
from toolkit.config.renamed import GONE, HERE, renamed


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("evaluation_strategy", "eval_every"),
        ("torch_dtype", "dtype"),
        ("max_seq_length", "max_length"),
        ("group_by_length", "length_grouping"),
        ("fp16_opt_level", "mixed_precision"),
        ("no_cuda", "cpu"),
        ("per_device_train_batch_size", "batch_size"),
        ("num_train_epochs", "max_epochs"),
        ("logging_dir", "output_dir"),
        ("overwrite_output_dir", "output_dir"),
        ("bf16", "mixed_precision"),
        ("warmup_steps", "warmup_ratio"),
        ("processing_class", "tokenizer"),
        # the training guide
        ("MODEL_NAME", "model"),
        ("NUM_EPOCHS", "max_epochs"),
        ("MAX_SEQ_LENGTH", "max_length"),
        ("USE_4BIT", "load_in_4bit"),
        ("USE_NESTED_QUANT", "nested_quant"),
        ("USE_GRADIENT_CHECKPOINTING", "gradient_checkpointing"),
        ("LORA_R", "lora_r"),
        ("BATCH_SIZE", "batch_size"),
        ("MAX_GRAD_NORM", "max_grad_norm"),
    ],
)
def test_names_from_elsewhere_lead_to_ours(problems, name, option):
    in_file = problems(file=f"{name}: 1")
    assert len(in_file) == 1
    assert in_file[0].startswith(f"run.yaml:1: unknown option '{name}'; ")
    assert f"'{option}'" in in_file[0]
    as_flag = problems(f"--{name.lower()}-x".removesuffix("-x") if name.islower() else f"--{name}", "1")
    assert len(as_flag) == 1
    assert option in as_flag[0].replace("-", "_")


def test_what_is_gone_says_so(problems):
    assert problems("--save-safetensors") == [
        "--save-safetensors: unknown option; it is gone: weights are always written as safetensors"
    ]


def test_every_entry_leads_to_an_option_and_hides_none():
    options = CentralizedConfig.model_fields
    assert {option for option, _ in HERE.values()} <= options.keys()
    assert not (HERE.keys() | GONE.keys()) & options.keys()
    assert not HERE.keys() & GONE.keys()
    assert all(name == name.lower() and "-" not in name for name in HERE.keys() | GONE.keys())


def test_an_entry_for_another_recipes_option_is_not_used():
    assert renamed("zero_stage", ["model"]) is None
