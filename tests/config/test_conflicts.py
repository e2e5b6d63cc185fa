import pytest

from toolkit.config.load import load
from toolkit.config.recipes import CentralizedConfig


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load-in-4bit --load-in-8bit", "--load-in-8bit: excludes load_in_4bit"),
        ("--finetuning full --load-in-4bit", "--load-in-4bit: needs finetuning: lora"),
        ("--finetuning full --load-in-8bit", "--load-in-8bit: needs finetuning: lora"),
        ("--quant-type fp4", "--quant-type: does nothing without load_in_4bit"),
        ("--no-nested-quant --load-in-8bit", "--no-nested-quant: does nothing without load_in_4bit"),
        ("--finetuning full --lora-r 8", "--lora-r: does nothing with finetuning: full"),
        ("--finetuning full --lora-target-modules q,v", "--lora-target-modules: does nothing with"),
        ("--finetuning full --use-dora", "--use-dora: does nothing with finetuning: full"),
        ("--finetuning full --use-rslora", "--use-rslora: does nothing with finetuning: full"),
        ("--finetuning full --merge-final", "--merge-final: does nothing with finetuning: full"),
        ("--packing --length-grouping", "--length-grouping: does nothing with packing"),
        ("--eval-data e.json --eval-fraction 0.1", "--eval-fraction: excludes eval_data"),
        ("--task sequence-classification --packing", "--packing: is for language models"),
        ("--task sequence-classification --loss-on all", "--loss-on: is for language models"),
        ("--task sequence-classification --sample-prompts Hi", "--sample-prompts: is for language models"),
        ("--task sequence-classification --chat-template x", "--chat-template: is for language models"),
        ("--sample-system-prompt Hi", "--sample-system-prompt: does nothing without sample_prompts"),
        ("--gpu 0 --cpu", "--gpu: excludes cpu"),
    ],
)
def test_options_that_do_not_fit_together(problems, flags, message):
    found = problems(*flags.split())
    assert len(found) == 1, found
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    "flags",
    [
        "--load-in-4bit --quant-type fp4 --no-nested-quant",
        "--finetuning full --lora-r 16",  # the default: a saved configuration holds it too
        "--eval-data e.json",
        "--task sequence-classification --length-grouping",
        "--packing --loss-on all",
    ],
)
def test_options_that_fit_together(loaded, flags):
    assert loaded(*flags.split()).config


def test_all_conflicts_come_at_once(problems):
    assert (
        len(problems("--load-in-4bit", "--load-in-8bit", "--finetuning", "full", "--cpu", "--gpu", "0")) == 4
    )


def test_a_conflict_with_an_option_that_is_wrong_itself_is_not_reported(problems):
    assert problems("--load-in-4bt", "--quant-type", "fp4") == [
        "--load-in-4bt: unknown option; did you mean '--load-in-4bit'?"
    ]
    assert problems("--finetuning", "ful", "--load-in-4bit") == [
        "--finetuning: 'ful' is not one of lora, full; did you mean 'full'?"
    ]


def test_a_configuration_built_in_python_obeys_the_same_rules():
    with pytest.raises(ValueError, match="length_grouping does nothing with packing"):
        CentralizedConfig(model="m", data="d", output_dir="o", packing=True, length_grouping=True)


def test_the_place_of_a_conflict_is_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\noutput_dir: o\npacking: true\n\nlength_grouping: true\n")
    with pytest.raises(Exception, match=r"run\.yaml:6: length_grouping: does nothing with packing"):
        load(CentralizedConfig, ["--config", str(path)])
