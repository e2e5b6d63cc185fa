"""Adapters by the command line: with their base as inputs of any method, and alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def adapters(trio, tmp_path_factory) -> dict[str, Path]:
    """Two adapters of rank 2 on model "a"."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(trio["a"])
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("one", "two")}


def merged_state(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """By PEFT."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter
    )
    return model.merge_and_unload().state_dict()


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_model_with_an_adapter_is_an_input_of_any_method(run_merge, trio, adapters, tmp_path):
    out = tmp_path / "out"
    models = [f"{trio['a']}+{adapters['one']}", f"{trio['a']}+{adapters['two']}"]
    status, _, errors = run_merge(
        *("--method", "task_arithmetic", "--base", trio["a"], "--models", *models, "--weights", ".7", ".4"),
        *("--out", out, "--lora-merge-cache", tmp_path / "cache"),
    )
    assert status == 0
    assert (
        errors
        == "note: --lora-merge-cache has no effect: adapters are applied while they are read; nothing is cached\n"
    )
    assert not (tmp_path / "cache").exists()
    one, two = (merged_state(trio["a"], adapters[name]) for name in ("one", "two"))
    base = {name: tensor.double() for name, tensor in load_file(trio["a"] / "model.safetensors").items()}
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = base[name] + 0.7 * (one[name] - base[name]) + 0.4 * (two[name] - base[name])
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-6)


def test_adapters_alone_become_an_adapter_of_their_exact_mean(run_merge, trio, adapters, tmp_path):
    out = tmp_path / "out"
    status, text, errors = run_merge(
        "--method", "linear", "--models", *adapters.values(), "--weights", ".75", ".25", "--out", out
    )
    assert (status, text) == (0, f"{out}\n")
    assert "concat: 2 adapters" in errors
    assert "relative error 0 %" in errors
    one, two = (merged_state(trio["a"], adapters[name]) for name in ("one", "two"))
    mean = {name: 0.75 * one[name] + 0.25 * two[name] for name in one}
    for name, tensor in merged_state(trio["a"], out).items():
        torch.testing.assert_close(tensor, mean[name], rtol=1e-6, atol=1e-7)


def test_adapters_in_a_recipe_file(run_merge, write_recipe, trio, adapters, tmp_path):
    path = write_recipe(
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        f"  - {{model: {adapters['one']}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {adapters['two']}, parameters: {{weight: 0}}}}\n"
    )
    assert run_merge(path, tmp_path / "out")[0] == 0
    torch.testing.assert_close(
        logits_of(trio["a"], tmp_path / "out"), logits_of(trio["a"], adapters["one"]), rtol=1e-4, atol=1e-5
    )


def test_the_residual_goes_into_the_base(run_merge, trio, adapters, tmp_path):
    out = tmp_path / "out"
    words = [
        "--method",
        "linear",
        "--models",
        *adapters.values(),
        "--base",
        trio["a"],
        "--lora-mode",
        "residual",
    ]
    status, text, _ = run_merge(*words, "--out", out)
    assert status == 0
    assert text.splitlines() == [f"{out / 'adapter'}", f"{out / 'model'} (the base of the adapter)"]
    one, two = (merged_state(trio["a"], adapters[name]) for name in ("one", "two"))
    for name, tensor in merged_state(out / "model", out / "adapter").items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)


def test_a_rank_is_chosen(run_merge, adapters, tmp_path):
    out = tmp_path / "out"
    words = ["--method", "linear", "--models", *adapters.values(), "--lora-mode", "svd", "--lora-rank", 2]
    assert run_merge(*words, "--out", out)[0] == 0
    assert '"r": 2' in (out / "adapter_config.json").read_text()


def test_a_dry_run_writes_nothing(run_merge, adapters, tmp_path):
    status, text, _ = run_merge(
        "--method", "linear", "--models", *adapters.values(), "--out", tmp_path / "o", "--dry-run"
    )
    assert status == 0
    assert f"adapter  {adapters['one']}  " in text
    assert text.endswith("Dry run: nothing was written.\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "ties", "--base", "{a}", "--models", "{one}", "{two}"],
            "adapters alone are merged by linear",
        ),
        (
            ["--method", "linear", "--models", "{one}+{two}", "{two}"],
            "- --models: {one}+{two}: {one} is an adapter itself, and takes no other one",
        ),
        (
            ["--method", "linear", "--models", "{one}+{two}", "{a}"],
            "{one} is an adapter itself, and takes no other one",
        ),
        (["--method", "linear", "--models", "{one}", "{a}"], "is an adapter, and other models are not"),
        (
            ["--method", "linear", "--models", "{a}", "{b}", "--lora-mode", "svd"],
            "--lora-mode is for adapters",
        ),
    ],
)
def test_what_does_not_go_with_adapters(run_merge, trio, adapters, tmp_path, words, message):
    words = [word.format(**trio, **adapters) for word in words]
    status, _, errors = run_merge(*words, "--out", tmp_path / "out")
    assert status == 2
    assert message.format(**trio, **adapters) in errors


def with_config(adapter: Path, base: Path, folder: Path) -> Path:
    """As a run saves the adapter of a classifier: the configuration of the model is beside it."""
    shutil.copytree(adapter, folder)
    shutil.copy(base / "config.json", folder)
    return folder


def test_an_adapter_with_a_configuration_beside_it_is_an_adapter(run_merge, trio, adapters, tmp_path):
    models = [with_config(adapters[name], trio["a"], tmp_path / name) for name in ("one", "two")]
    out = tmp_path / "out"
    assert run_merge("--method", "linear", "--models", *models, "--out", out)[0] == 0
    assert (out / "adapter_config.json").is_file()
    assert not (out / "config.json").exists()
    one, two = (merged_state(trio["a"], adapters[name]) for name in ("one", "two"))
    for name, tensor in merged_state(trio["a"], out).items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-6, atol=1e-7)


def test_an_adapter_is_no_model(run_merge, write_recipe, trio, adapters, tmp_path):
    folder = with_config(adapters["one"], trio["a"], tmp_path / "with-config")
    for adapter in (adapters["one"], folder):
        words = [
            "--method",
            "task_arithmetic",
            "--base",
            adapter,
            "--models",
            trio["b"],
            "--out",
            tmp_path / "o",
        ]
        status, _, errors = run_merge(*words)
        assert status == 2
        assert f"{adapter} is an adapter, and a model is expected" in errors
    sources = "".join(f"    - {{model: {folder}, layer_range: [0, 1]}}\n" for _ in range(1))
    path = write_recipe(f"merge_method: passthrough\nslices:\n  - sources:\n{sources}")
    status, _, errors = run_merge(path, tmp_path / "o")
    assert status == 2
    assert "is an adapter, and a model is expected" in errors


def test_a_model_with_an_adapter_file_beside_its_weights_is_a_model(run_merge, trio, adapters, tmp_path):
    shutil.copytree(trio["a"], tmp_path / "both")
    for path in adapters["one"].glob("adapter_*"):
        shutil.copy(path, tmp_path / "both")
    words = ["--method", "linear", "--models", tmp_path / "both", trio["b"], "--out", tmp_path / "out"]
    assert run_merge(*words)[0] == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture
def hub(adapters, trio, tmp_path) -> Path:
    """A cache of the hub with owner/one, owner/two and their base owner/a."""
    for name, origin in {**adapters, "a": trio["a"]}.items():
        repository = tmp_path / "hub" / f"models--owner--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(origin, repository / "snapshots" / ("0" * 40))
    return tmp_path / "hub"


def test_adapters_of_the_hub_are_found_in_the_cache(run_merge, hub, tmp_path):
    words = ["--method", "linear", "--models", "owner/one", "owner/two", "--dry-run", "--out", tmp_path / "o"]
    status, text, errors = run_merge(*words, "--transformers-cache", hub)
    assert (status, errors) == (0, "")
    assert f"adapter  {hub}/models--owner--one/snapshots/{'0' * 40}  " in text
    more = ["--transformers-cache", hub, "--lora-mode", "residual", "--base", "owner/a"]
    assert "base     owner/a  " in run_merge(*words, *more)[1]


def test_the_base_of_the_residual_may_have_an_adapter(run_merge, trio, adapters, tmp_path):
    base = f"{trio['a']}+{adapters['one']}"
    words = ["--method", "linear", "--models", *adapters.values(), "--base", base, "--lora-mode", "residual"]
    assert run_merge(*words, "--out", tmp_path / "out")[0] == 0
    model, one, two = (
        load_file(trio["a"] / "model.safetensors"),
        *(merged_state(trio["a"], adapters[name]) for name in ("one", "two")),
    )
    for name, tensor in merged_state(tmp_path / "out" / "model", tmp_path / "out" / "adapter").items():
        plain = model.get(name, model["model.embed_tokens.weight"]).double()
        expected = one[name] + ((one[name] - plain) + (two[name] - plain)) / 2
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("lines", "place", "message"),
    [
        ("weight: [0, 1]", 5, "weight is one value for all of an adapter"),
        ("weight: [{filter: mlp, value: 1}, {value: 0}]", 5, "weight is one value for all of an adapter"),
        ("weight: [{filter: mlp, value: 1}]", 5, "weight is one value for all of an adapter"),
        (
            "weight: 1\nparameters: {normalize: [true, false]}",
            6,
            "normalize is one value for all of an adapter",
        ),
        ("weight: 0", 5, "the weights 0 add up to 0"),
        ("weight: 1\ntokenizer_source: union", 6, "adapters have no vocabulary"),
        ("weight: 1\ntokenizer: {pad_to_multiple_of: 8}", 6, "adapters have no vocabulary"),
        ("weight: 1\nchat_template: chatml", None, "chat_template: adapters keep"),
    ],
)
def test_what_a_recipe_says_that_adapters_cannot_have(
    run_merge, write_recipe, adapters, tmp_path, lines, place, message
):
    path = write_recipe(
        f"merge_method: linear\nmodels:\n  - model: {adapters['one']}\n    parameters:\n      {lines}\n"
    )
    status, _, errors = run_merge(path, tmp_path / "out", "--dry-run")
    assert status == 2
    assert f"- {path}{f':{place}' if place else ''}: {message}" in errors


def test_flags_in_the_place_of_lines(run_merge, adapters, tmp_path):
    words = ["--method", "linear", "--models", *adapters.values(), "--dry-run", "--out", tmp_path / "out"]
    assert "- --weights: the weights 1, -1 add up to 0" in run_merge(*words, "--weights", 1, -1)[2]
    errors = run_merge(*words, "--param", "normalize=[true,false]")[2]
    assert "- --param normalize: normalize is one value for all of an adapter" in errors
    errors = run_merge(*words, "--tokenizer-source", "union")[2]
    assert "- --tokenizer-source: adapters have no vocabulary" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-mode", "residual"], "the mode residual needs a base"),
        (["--lora-rank", "2"], "a rank is chosen in the mode svd only"),
        (["--models", "{other}"], "differ: base"),
        (["--models", "{damaged}"], "adapter_model.safetensors"),
        (["--lora-mode", "residual", "--base", "{small}"], "which {small} does not have"),
    ],
)
def test_a_dry_run_finds_what_the_merge_would_find(
    run_merge, trio, adapters, make_model, tmp_path, words, message
):
    other, damaged = (shutil.copytree(adapters["one"], tmp_path / name) for name in ("other", "damaged"))
    path = other / "adapter_config.json"
    path.write_text(path.read_text().replace(str(trio["a"]), "another/model"))
    (damaged / "adapter_model.safetensors").write_bytes(b"\x10")
    small = make_model("small", {"x": np.ones(2, np.float32)})
    names = {**trio, "other": other, "damaged": damaged, "small": small}
    words = [word.format(**names) for word in words]
    models = ["--method", "linear", "--models", *adapters.values()]
    status, text, errors = run_merge(*models, *words, "--out", tmp_path / "out", "--dry-run")
    assert (status, text) == (2, "")
    assert message.format(**names) in errors


def test_a_recipe_file_names_the_base_of_the_residual(run_merge, write_recipe, trio, adapters, tmp_path):
    models = "".join(f"  - model: {folder}\n" for folder in adapters.values())
    path = write_recipe(
        f"merge_method: linear\nbase_model: {trio['a']}\nparameters: {{weight: 1}}\nmodels:\n{models}"
    )
    status, text, _ = run_merge(path, tmp_path / "out", "--lora-mode", "residual", "--dry-run")
    assert status == 0
    assert f"base     {trio['a']}  " in text
    status, _, errors = run_merge(path, tmp_path / "out", "--dry-run")
    assert status == 2
    assert "the mode residual needs a base, and no other mode takes one" in errors


def test_verbose_prints_the_plan_first(run_merge, adapters, tmp_path):
    words = ["--method", "linear", "--models", *adapters.values(), "--out", tmp_path / "out", "--verify"]
    _, text, errors = run_merge(*words, "--verbose")
    assert text.startswith("Method   linear, of adapters: concat\nInputs\n")
    assert "rank 2, weight 0.5\n" in text
    assert "Note     --verify has no effect: the models are adapters\n" in text
    assert text.endswith(f"{tmp_path / 'out'}\n")
    assert "--verify" not in errors


def test_adapters_of_different_bases_are_noted_once(run_merge, trio, adapters, tmp_path):
    other = shutil.copytree(adapters["one"], tmp_path / "other")
    path = other / "adapter_config.json"
    path.write_text(path.read_text().replace(str(trio["a"]), "another/model"))
    words = ["--method", "linear", "--models", adapters["two"], other, "--out", tmp_path / "out", "--lenient"]
    for more in (["--dry-run"], ["--verbose"], ["--overwrite"]):
        status, text, errors = run_merge(*words, *more)
        assert status == 0
        assert (text + errors).count("differ: base") == 1


def test_notes_of_the_recipe_are_printed(run_merge, write_recipe, adapters, tmp_path):
    path = write_recipe(
        f"merge_method: linear\nparameters: {{int8_mask: true}}\nanything: 1\nmodels:\n"
        f"  - {{model: {adapters['one']}, parameters: {{weight: 1}}}}\n"
    )
    _, _, errors = run_merge(path, tmp_path / "out", "--lenient", "--no-hash-inputs")
    assert f"note: {path}:2: int8_mask has no effect: masks take no memory here\n" in errors
    assert f"note: {path}:3: unknown key 'anything'\n" in errors
    assert "note: --no-hash-inputs has no effect: the models are adapters\n" in errors
    _, text, _ = run_merge(path, tmp_path / "other", "--lenient", "--dry-run")
    assert f"Note     {path}:2: int8_mask" in text


def test_flags_that_say_nothing_about_adapters_are_noted(run_merge, adapters, tmp_path):
    words = ["--method", "linear", "--models", *adapters.values(), "--out", tmp_path / "out"]
    assert "note: --verify has no effect: the models are adapters\n" in run_merge(*words, "--verify")[2]
