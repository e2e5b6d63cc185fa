import json

import pytest

from toolkit.config.load import load
from toolkit.config.recipes import CentralizedConfig
from toolkit.config.shipped import shipped_file
from toolkit.errors import ConfigError

FILE = "model: from-file\ndata: d.json\noutput_dir: out\nlearning_rate: 1e-4\nlora_r: 4\n"


@pytest.fixture
def run_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(FILE)
    return tmp_path / "run.yaml"


def test_flags_win_over_the_file_and_every_value_has_its_origin(run_yaml):
    result = load(CentralizedConfig, ["--config", "run.yaml", "--lora-r", "8"])
    assert (result.config.model, result.config.lora_r, result.config.learning_rate) == ("from-file", 8, 1e-4)
    assert result.provenance["model"] == "run.yaml:1"
    assert result.provenance["lora_r"] == "flag --lora-r"
    assert result.provenance["max_epochs"] == "default"
    assert set(result.provenance) == set(CentralizedConfig.model_fields)
    assert load(CentralizedConfig, ["--config-file=run.yaml"]).config.lora_r == 4


def test_all_problems_come_at_once_each_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "modle: m\nlearning_rate: fast\nlora_r: 0\npacking: true\npacking: false\nmax_seq_length: 5\n"
        "report_to: [wandb, mlflow]\nlength_grouping: true\ntrainer_args:\n  adam_betta1: 1\n"
    )
    argv = ["--config", "run.yaml", "--batch-size", "many", "--data", "d", "stray"]
    with pytest.raises(ConfigError) as caught:
        load(CentralizedConfig, argv)
    assert sorted(caught.value.problems) == sorted(
        [
            "'stray': an option begins with --",
            "run.yaml:5: 'packing' is given twice; first in line 4",
            "run.yaml:1: unknown option 'modle'; did you mean 'model'?",
            "run.yaml:6: unknown option 'max_seq_length'; it is called 'max_length' here",
            "run.yaml:2: learning_rate: 'fast' is not a number",
            "run.yaml:3: lora_r: 0 is out of range; it must be at least 1",
            "run.yaml:7: report_to: 'mlflow' is not one of tensorboard, wandb, trackio",
            "--batch-size: 'many' is not a whole number",
            "output_dir is missing: --output-dir PATH (run directory)",
            "run.yaml:8: length_grouping: does nothing with packing, which fills every sequence",
            "run.yaml:10: trainer_args.adam_betta1: the installed SFTConfig has no such argument; "
            "did you mean 'adam_beta1'?",
        ]
    )
    assert caught.value.exit_status == 2
    assert str(caught.value).startswith("11 problems in the configuration:\n  - ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora_r: true", "lora_r: true is not a whole number"),
        ("lora_r: 2.5", "lora_r: 2.5 is not a whole number"),
        ("lora_r:", "lora_r: has no value"),
        ("lora_r: [4]", "lora_r: is a list; a whole number is expected"),
        ("lora_r: {a: 4}", "lora_r: is a mapping; a whole number is expected"),
        ("learning_rate: .nan", "learning_rate: nan is not a finite number"),
        ("learning_rate: .inf", "learning_rate: inf is not a finite number"),
        ("lora_dropout: 1.0", "lora_dropout: 1.0 is out of range; it must be less than 1"),
        ("packing: 3", "packing: 3 is not true or false"),
        ("run_name: true", "run_name: true is not text (for text, put it in quotes)"),
        ("dtype: bfloat17", "did you mean 'bfloat16'?"),
        ("data_mapping: [a]", "data_mapping: is a list; a mapping is expected"),
        ("lora_target_modules: {a: b}", "lora_target_modules: is a mapping; a list of names is expected"),
        ("sample_prompts: [a, [b]]", "sample_prompts: ['b'] is not text"),
        ("eval_every: sometimes", "eval_every: 'sometimes' is not epoch, never, or a number of steps"),
        ("checkpoint_every: 0", "checkpoint_every: '0' is not epoch, never, or a number of steps"),
        ("checkpoint_every: 2.5", "checkpoint_every: '2.5' is not"),
        ("gpu: cuda:0", "gpu: 'cuda:0' is not a list of GPU numbers"),
        ("gpu: 0,0", "gpu: '0,0' names a GPU twice"),
        ("optim: adamw", "optim: 'adamw' is not one of"),
        ("lr_scheduler: cosin", "did you mean 'cosine'?"),
    ],
)
def test_wrong_values_in_plain_words(problems, line, message):
    found = problems(file=line)
    assert len(found) == 1, found
    assert found[0].startswith("run.yaml:1: ")
    assert message in found[0]
    assert "pydantic" not in found[0]


def test_text_options_take_numbers_as_they_are_written(loaded):
    config = loaded(
        file="gpu: 0\nrevision: 012e5\neval_every: 50\nrun_name: 1.50\nmixed_precision: no\n"
    ).config
    assert (config.gpu, config.revision, config.eval_every, config.run_name) == ("0", "012e5", "50", "1.50")
    assert config.mixed_precision == "no"


def test_one_module_name_is_an_ending_and_not_an_expression(loaded):
    assert loaded("--lora-target-modules", "q_proj").config.lora_target_modules == ["q_proj"]
    assert loaded("--lora-target-modules", "q_proj,v_proj").config.lora_target_modules == ["q_proj", "v_proj"]
    assert loaded("--lora-target-modules", "all-linear").config.lora_target_modules == "all-linear"
    assert loaded("--lora-target-modules", r".*\.(q|v){1,2}").config.lora_target_modules == r".*\.(q|v){1,2}"
    assert loaded(file="lora_target_modules: [q, v]").config.lora_target_modules == ["q", "v"]


def test_a_lone_value_is_a_list_of_one_in_a_file_too(loaded):
    assert loaded(file="report_to: wandb").config.report_to == ["wandb"]
    assert loaded(file="sample_prompts: Hello, you").config.sample_prompts == ["Hello, you"]


def test_a_saved_configuration_gives_the_same_run(loaded, tmp_path):
    first = loaded(
        *("--max-epochs", "2", "--lora-target-modules", "q,v", "--sample-prompts", "a\u2028b \U0001f600"),
        *("--trainer-args", "adam_beta2=0.95", "--finetuning", "lora", "--chat-template", "t.jinja"),
    ).config
    path = tmp_path / "experiment_config.json"
    path.write_text(json.dumps(first.model_dump(mode="json"), ensure_ascii=False))
    assert load(CentralizedConfig, ["--config", str(path)]).config == first


def test_the_recipes_own_file_is_used_when_nothing_required_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = shipped_file("centralized-hf")
    config = load(CentralizedConfig, ["--max-epochs", "1", "--output-dir", "x"], default_file=file).config
    assert (config.model, config.max_epochs, str(config.output_dir)) == ("Qwen/Qwen3-8B-Base", 1, "x")
    with pytest.raises(ConfigError, match="data is missing"):
        load(CentralizedConfig, ["--model", "m", "--output-dir", "x"], default_file=file)
    named = load(CentralizedConfig, ["--config", "centralized-hf", "--model", "m"])
    assert (named.config.model, named.config.load_in_4bit) == ("m", True)


def test_the_recipes_own_file_has_the_values_of_the_guide():
    config = load(CentralizedConfig, ["--config", "centralized-hf"]).config
    guide = {
        "model": "Qwen/Qwen3-8B-Base",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "max_epochs": 3.0,
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "max_length": 1536,
        "warmup_ratio": 0.03,
        "max_grad_norm": 1.0,
        "load_in_4bit": True,
        "nested_quant": True,
        "gradient_checkpointing": True,
        "data": "data/train.json",
        "eval_data": "data/valid.json",
        "output_dir": "qwen3_java_evaluator_lora",
    }
    dumped = config.model_dump(mode="json")
    assert {name: dumped[name] for name in guide} == guide


def test_resume_takes_the_configuration_of_the_run(loaded, tmp_path):
    saved = loaded("--max-epochs", "2").config.model_dump(mode="json")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "experiment_config.json").write_text(json.dumps(saved))
    argv = ["--resume", "--output-dir", "o"]
    config = load(CentralizedConfig, argv, default_file=shipped_file("centralized-hf")).config
    assert (config.model, config.max_epochs, config.resume) == ("m", 2, True)


def test_a_misspelt_name_is_not_reported_as_missing_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(CentralizedConfig, ["--modle", "m", "--data", "d", "--output-dir", "o"])
    assert caught.value.problems == ["--modle: unknown option; did you mean '--model'?"]


def test_configurations_cannot_be_changed_or_extended():
    config = CentralizedConfig(model="m", data="d", output_dir="o")
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"
    with pytest.raises(ValueError, match="Extra inputs"):
        CentralizedConfig(model="m", data="d", output_dir="o", modle="x")
