from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.config.load import load
from toolkit.config.recipes import CentralizedConfig
from toolkit.config.render import as_yaml, save
from toolkit.config.yaml_file import parse


def test_the_printed_configuration_loads_again(loaded, tmp_path):
    first = loaded(
        "--lora-r", "8", "--learning-rate", "3e-7", file="revision: 1e5\nmixed_precision: no\nrun_name: '~'"
    )
    text = as_yaml(first)
    (tmp_path / "again.yaml").write_text(text)
    assert load(CentralizedConfig, ["--config", "again.yaml"]).config == first.config
    assert yaml.safe_load(text)["lora_r"] == 8  # other readers of YAML get along with it


def test_every_line_says_where_its_value_comes_from(loaded):
    lines = as_yaml(loaded("--lora-r", "8", file="seed: 7")).splitlines()
    assert [
        line.split("#")[1].strip() for line in lines if line.startswith(("lora_r:", "seed:", "cpu:"))
    ] == [
        "flag --lora-r",
        "run.yaml:1",
        "default",
    ]
    assert {
        line.split(":")[0] for line in lines if line and line[0] != "#"
    } == CentralizedConfig.model_fields.keys()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
)
@pytest.mark.parametrize("option", ["run_name", "project"])
def test_any_text_survives_a_file(option, text):
    config = CentralizedConfig(model="m", data="d", output_dir=Path("o"), **{option: text})
    from toolkit.config.command_line import Request
    from toolkit.config.load import Loaded

    printed = as_yaml(Loaded(config, dict.fromkeys(CentralizedConfig.model_fields, "default"), Request()))
    entries, problems = parse(printed, "x.yaml")
    assert problems == []
    assert next(entry.text for entry in entries if entry.name == option) == text


def test_the_ending_decides_the_form(loaded, tmp_path):
    first = loaded("--lora-r", "8")
    save(first, tmp_path / "c.yaml")
    save(first, tmp_path / "c.json")
    assert "# flag --lora-r" in (tmp_path / "c.yaml").read_text()
    assert (tmp_path / "c.json").read_text().startswith("{")
    for name in ("c.yaml", "c.json"):
        assert load(CentralizedConfig, ["--config", name]).config == first.config
