"""What lies beside the weights: copied by content, adapted, never run, links followed only inside."""

import json
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import yaml

from toolkit.errors import MergeError, ModelError
from toolkit.merging.recipes.recipe_file import read
from toolkit.merging.recipes.resolve import PlanOptions, plan_merge

LINEAR = "merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"


@pytest.fixture
def companions_of(write_recipe, trio, tmp_path):
    """Write the companions of a recipe; return their folder and the plan's notes."""

    def write(text: str = LINEAR, **options):
        plan = plan_merge(read(write_recipe(text.format(**trio))), PlanOptions(**options))
        out = tmp_path / "out"
        out.mkdir()
        plan.write_companions(out)
        return out, plan.notes

    return write


@pytest.fixture
def a_model(make_model):
    """A model without tokenizer whose folder can be changed."""
    return make_model("m", {"x": np.ones(2, np.float32)}, num_hidden_layers=1)


def write_of(write_recipe, tmp_path, folder: Path, top: str = "", **options):
    text = f"merge_method: linear\nmodels: [{{model: {folder}, parameters: {{weight: 1}}}}]\n{top}"
    plan = plan_merge(read(write_recipe(text)), PlanOptions(**options))
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    plan.write_companions(out)
    return out, plan.notes


def test_a_model_folder_is_complete(companions_of, trio):
    out, notes = companions_of()
    assert notes == []
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (trio["a"] / name).read_bytes()
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o644
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (trio["a"] / "config.json").read_text()
    )


def test_the_recipe_is_kept_verbatim(companions_of, trio):
    text = "# my merge\n" + LINEAR
    out, _ = companions_of(text)
    assert (out / "mergekit_config.yml").read_text() == text.format(**trio)


def test_the_card_has_metadata_for_the_hub(companions_of, trio):
    out, _ = companions_of()
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["merge", "meldkit"]}  # folders are no hub ids
    assert f"- `{trio['a']}`\n- `{trio['b']}`" in card
    assert "merge_method: linear" in card


def test_flags_leave_things_out(companions_of):
    out, _ = companions_of(write_card=False, copy_tokenizer=False)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
    }


def test_a_template_by_name_replaces_the_tokenizers(companions_of):
    out, _ = companions_of(LINEAR + "chat_template: llama3\n")
    assert "<|start_header_id|>" in (out / "chat_template.jinja").read_text()


def test_the_template_of_most_models(write_recipe, trio, tmp_path, make_model):
    folders = [make_model(name, {"x": np.ones(2, np.float32)}) for name in "abc"]
    for folder, template in zip(folders, ("{{ one }}", "{{ two }}", "{{ two }}"), strict=True):
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, "model_max_length": 7})
        )
    models = ", ".join(f"{{model: {folder}}}" for folder in folders)
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{models}]\nchat_template: auto\n"
    out = tmp_path / "out"
    out.mkdir()
    plan_merge(read(write_recipe(text))).write_companions(out)
    assert (out / "chat_template.jinja").read_text() == "{{ two }}"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 7}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("chatmll", "did you mean 'chatml'?"),
        ("'{{% if messages %}} this is never closed'", "chat_template, line 1"),
        ("nowhere.jinja", "is not one of auto, chatml"),
    ],
)
def test_templates_that_are_none(companions_of, value, words):
    with pytest.raises(ModelError, match=re.escape(words)):
        companions_of(LINEAR + f"chat_template: {value}\n")


def test_exaone_marks_every_turn(companions_of):
    from jinja2 import Environment

    out, _ = companions_of(LINEAR + "chat_template: exaone\n")
    template = Environment().from_string((out / "chat_template.jinja").read_text())
    asked = [{"role": "user", "content": "Hi"}]
    talk = [*asked, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Go"}]
    assert template.render(messages=asked, add_generation_prompt=True) == (
        "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"
    )
    assert template.render(messages=[{"role": "system", "content": "Be kind"}, *talk]) == (
        "[|system|]Be kind[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes[|endofturn|]\n[|user|]Go\n"
    )


@pytest.mark.parametrize("value", ["auto", "{path}"])
def test_a_template_that_is_no_text_is_named(write_recipe, tmp_path, make_model, value):
    folder = make_model("m", {"x": np.ones(2, np.float32)})
    path = folder / "chat_template.jinja"
    path.write_bytes(b"{{ '\xff' }} is no UTF-8")
    with pytest.raises(ModelError, match=r"m/chat_template\.jinja cannot be read: .*utf-8"):
        write_of(write_recipe, tmp_path, folder, f"chat_template: {value.format(path=path)}\n")


def test_token_ids_are_those_of_the_tokenizer(companions_of, trio, tmp_path):
    other = shutil.copytree(trio["b"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"bos_token_id": 7, "eos_token_id": 8}))
    own = json.loads((trio["a"] / "generation_config.json").read_text())
    assert {"bos_token_id", "eos_token_id"} <= own.keys()
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9], "top_k": 3}))
    text = LINEAR.replace("{{model: {b}}}", f"{{{{model: {other}}}}}")
    out, _ = companions_of(text + f"tokenizer_source: {other}\n")
    written = json.loads((out / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (7, 8)
    found = json.loads((out / "generation_config.json").read_text())
    assert found == own | {"bos_token_id": 7, "eos_token_id": [8, 9]}  # the rest stays the donor's


def test_a_model_without_tokenizer_is_noted(write_recipe, tmp_path, a_model):
    out, notes = write_of(write_recipe, tmp_path, a_model, "chat_template: chatml\n")
    assert notes == [
        f"{a_model} has no tokenizer: none is written",
        "chat_template is not written: there is no tokenizer",
    ]
    assert not (out / "chat_template.jinja").exists()


def test_a_link_out_of_the_folder_is_not_followed(write_recipe, tmp_path, a_model):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (a_model / "generation_config.json").symlink_to(secret)
    with pytest.raises(MergeError, match=r"generation_config\.json is a link to .*secret\.txt, outside"):
        write_of(write_recipe, tmp_path, a_model)
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_link_inside_the_folder_is_copied_by_content(write_recipe, tmp_path, a_model):
    (a_model / "other.json").write_text("{}")
    (a_model / "generation_config.json").symlink_to("other.json")
    out, _ = write_of(write_recipe, tmp_path, a_model)
    assert not (out / "generation_config.json").is_symlink()
    assert (out / "generation_config.json").read_text() == "{}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_that_cannot_be_read_is_an_error(write_recipe, tmp_path, a_model):
    (a_model / "generation_config.json").write_text("{}")
    (a_model / "generation_config.json").chmod(0)
    with pytest.raises(MergeError, match=r"generation_config\.json cannot be copied"):
        write_of(write_recipe, tmp_path, a_model)


def test_code_of_a_model_is_copied_only_when_asked(write_recipe, tmp_path, make_model):
    folder = make_model("m", {"x": np.ones(2, np.float32)}, auto_map={"AutoModel": "modeling_toy.Toy"})
    (folder / "modeling_toy.py").write_text("raise SystemExit('never run')\n")
    out, notes = write_of(write_recipe, tmp_path, folder)
    assert not (out / "modeling_toy.py").exists()
    assert any("auto_map" in note for note in notes)
    out, _ = write_of(write_recipe, tmp_path, folder, copy_code=True)
    assert (out / "modeling_toy.py").is_file()


def test_dtype_is_said_where_the_model_says_it(write_recipe, tmp_path, make_model):
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "num_hidden_layers": 1}}
    folder = make_model("m", {"x": np.ones(2, np.float32)}, **config)
    out, _ = write_of(write_recipe, tmp_path, folder, "dtype: bfloat16\n")
    written = json.loads((out / "config.json").read_text())
    assert (written["torch_dtype"], written["text_config"]["dtype"], "dtype" in written) == (
        "bfloat16",
        "bfloat16",
        False,
    )
