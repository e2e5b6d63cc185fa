"""Adapters by the command line: with their base as inputs of any method, and alone."""

from pathlib import Path

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
    assert message in errors


def test_flags_that_say_nothing_about_adapters_are_noted(run_merge, adapters, tmp_path):
    words = ["--method", "linear", "--models", *adapters.values(), "--out", tmp_path / "out"]
    assert "note: --verify has no effect: the models are adapters\n" in run_merge(*words, "--verify")[2]
