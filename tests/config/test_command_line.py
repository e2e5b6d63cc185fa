import pytest


def test_three_spellings_of_a_flag_are_the_same(loaded):
    for flags in (["--max-epochs", "5"], ["--max_epochs", "5"], ["--max-epochs=5"]):
        result = loaded(*flags)
        assert result.config.max_epochs == 5
        assert result.provenance["max_epochs"] == f"flag {flags[0].split('=')[0]}"


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], False),
        (["--packing"], True),
        (["--no-packing"], False),
        (["--no_packing"], False),
        (["--packing", "true"], True),
        (["--packing=off"], False),
        (["--packing", "No"], False),
        (["--packing", "--max-epochs", "1"], True),
    ],
)
def test_switches(loaded, flags, value):
    assert loaded(*flags).config.packing is value


def test_a_switch_takes_no_other_word(problems):
    assert problems("--packing=maybe") == ["--packing: 'maybe' is not true or false"]
    assert problems("--packing", "maybe")[0].startswith("'maybe': an option begins with --")
    assert "takes no value" in problems("--no-packing=true")[0]


def test_lists_are_separated_by_commas_or_repeated(loaded):
    once = loaded("--lora-modules-to-save", "a, b").config.lora_modules_to_save
    assert (
        once
        == loaded("--lora-modules-to-save", "a", "--lora-modules-to-save", "b").config.lora_modules_to_save
    )
    assert once == loaded("--lora-modules-to-save", '["a", "b"]').config.lora_modules_to_save == ["a", "b"]
    assert loaded("--report-to", "none").config.report_to == []


def test_a_prompt_keeps_its_commas(loaded):
    config = loaded("--sample-prompts", "Hello, you", "--sample-prompts", "Bye").config
    assert config.sample_prompts == ["Hello, you", "Bye"]


def test_mappings(loaded):
    config = loaded(
        *("--trainer-args", "neftune_noise_alpha=5,adam_beta2=0.95"),
        *("--trainer-args", 'lr_scheduler_kwargs={"a": 1, "b": 2}'),
        *("--data-mapping", "prompt=1,completion=answer"),
    ).config
    assert config.trainer_args == {
        "neftune_noise_alpha": 5,
        "adam_beta2": 0.95,
        "lr_scheduler_kwargs": {"a": 1, "b": 2},
    }
    assert config.data_mapping == {"prompt": "1", "completion": "answer"}


def test_mappings_that_are_none(problems):
    assert problems("--data-mapping", "prompt") == ["--data-mapping: 'prompt' is not NAME=VALUE"]
    assert problems("--trainer-args", "adam_beta2=[1") != []
    assert problems("--data-mapping", "a=1", "--data-mapping", "a=2") == [
        "--data-mapping: 'a' is given twice"
    ]


def test_a_mapping_on_the_command_line_wins_name_by_name(loaded):
    result = loaded(
        "--trainer-args", "adam_beta2=0.9", file="trainer_args:\n  adam_beta2: 0.5\n  adam_beta1: 0.8\n"
    )
    assert result.config.trainer_args == {"adam_beta2": 0.9, "adam_beta1": 0.8}
    assert result.provenance["trainer_args"] == "run.yaml:1, flag --trainer-args"


def test_negative_numbers_are_values_and_flags_are_not(problems):
    assert problems("--learning-rate", "-1e-3") == [
        "--learning-rate: '-1e-3' is out of range; it must be more than 0"
    ]
    assert problems("--run-name", "--max-epochs", "3") == ["--run-name: no value is given; --run-name TEXT"]
    assert problems("--run-name") == ["--run-name: no value is given; --run-name TEXT"]


def test_a_value_with_a_dash_is_given_with_an_equals_sign(loaded):
    assert loaded("--run-name=-x").config.run_name == "-x"


def test_none_takes_a_value_away(loaded):
    assert loaded("--max-rows", "none", file="max_rows: 5").config.max_rows is None


def test_a_flag_given_twice(problems):
    assert problems("--lora-r", "4", "--lora_r=8") == ["--lora_r: is given twice; first as --lora-r"]
    assert problems("--packing", "--no-packing") == ["--no-packing: is given twice; first as --packing"]
    assert problems("--config", "a.yaml", "--config-file", "b.yaml")[0] == "--config-file: is given twice"


def test_stray_words(problems):
    assert problems("lora-r=4") == ["'lora-r=4': an option begins with --; did you mean '--lora-r'?"]
    found = problems("--report-to", "wandb", "trackio")
    assert found == [
        "'trackio': an option begins with --; several values of --report-to are written --report-to a,b"
    ]
    assert problems("-x") == ["'-x': an option begins with --"]


def test_unknown_flags_name_the_nearest(problems):
    assert problems("--learnin-rate", "3") == [
        "--learnin-rate: unknown option; did you mean '--learning-rate'?"
    ]
    assert problems("--LORA_R", "3") == ["--LORA_R: unknown option; did you mean '--lora-r'?"]
    assert problems("--no-packin") == ["--no-packin: unknown option; did you mean '--no-packing'?"]
    assert problems("--dry-ran") == ["--dry-ran: unknown option; did you mean '--dry-run'?"]
    assert problems("--xyzzy") == ["--xyzzy: unknown option"]


def test_requests(loaded):
    request = loaded("--dry-run", "--save-config", "--debug").request
    assert (request.dry_run, request.print_config, request.debug, request.save_config) == (
        True,
        False,
        True,
        "",
    )
    assert loaded("--save-config", "x.yaml").request.save_config == "x.yaml"
    assert loaded().request.save_config is None
