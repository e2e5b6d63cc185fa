"""Whole merges by the command line, loaded by transformers: logits equal those of a merge by hand."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = torch.arange(3, 40)[None]


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def logits_of_state(like: Path, state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(like, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same(out: Path, like: Path, expected: dict[str, torch.Tensor]) -> None:
    """The weights are the expected ones rounded once to float32, and so are the logits."""
    merged = state_of(out)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor.float().double(), rtol=2e-7, atol=1e-9)
    torch.testing.assert_close(logits_of(out), logits_of_state(like, expected), rtol=1e-5, atol=1e-5)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    x, y = a.reshape(-1), b.reshape(-1)
    cosine = float(x @ y / (x.norm() * y.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def test_linear_by_flags(run_merge, trio, tmp_path):
    out = tmp_path / "out"
    status, printed, errors = run_merge(
        "--method",
        "linear",
        "--models",
        trio["a"],
        trio["b"],
        trio["c"],
        "--weights",
        ".5",
        ".3",
        ".2",
        "--out",
        out,
    )
    assert (status, errors) == (0, "")
    assert printed.startswith(f"{out}: 20 tensors, 460 kB in 1 file; ")
    a, b, c = (state_of(trio[name]) for name in "abc")
    assert_same(out, trio["a"], {name: 0.5 * a[name] + 0.3 * b[name] + 0.2 * c[name] for name in a})
    assert AutoTokenizer.from_pretrained(out).decode([5, 6]) == AutoTokenizer.from_pretrained(
        trio["a"]
    ).decode([5, 6])
    recipe = (out / "mergekit_config.yml").read_text()
    again = tmp_path / "again"
    (tmp_path / "again.yml").write_text(recipe)
    assert run_merge(tmp_path / "again.yml", again)[0] == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_slerp_with_gradients_and_filters(run_merge, write_recipe, trio, tmp_path):
    path = write_recipe(
        f"""
slices:
  - sources:
      - {{model: {trio["a"]}, layer_range: [0, 2]}}
      - {{model: {trio["b"]}, layer_range: [0, 2]}}
merge_method: slerp
base_model: {trio["a"]}
parameters:
  t:
    - {{filter: self_attn, value: [0.2, 0.9]}}
    - {{filter: mlp, value: 0.4}}
    - value: 0.5
"""
    )
    assert run_merge(path, tmp_path / "out")[0] == 0
    a, b = state_of(trio["a"]), state_of(trio["b"])

    def t_of(name: str) -> float:
        return (0.9 if ".1." in name else 0.2) if "self_attn" in name else 0.4 if "mlp" in name else 0.5

    assert_same(tmp_path / "out", trio["a"], {name: slerp(a[name], b[name], t_of(name)) for name in a})


def test_task_arithmetic_in_bfloat16(run_merge, write_recipe, trio, tmp_path):
    path = write_recipe(
        f"""
merge_method: task_arithmetic
base_model: {trio["a"]}
models:
  - {{model: {trio["b"]}, parameters: {{weight: 0.6}}}}
  - {{model: {trio["c"]}, parameters: {{weight: -0.3}}}}
parameters: {{lambda: 0.7}}
dtype: bfloat16
"""
    )
    assert run_merge(path, tmp_path / "out", "--verify")[0] == 0
    a, b, c = (state_of(trio[name]) for name in "abc")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = a[name] + 0.7 * (0.6 * (b[name] - a[name]) - 0.3 * (c[name] - a[name]))
        assert torch.equal(tensor, expected.to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_stacked_layers_give_the_logits_of_the_stack(run_merge, write_recipe, trio, tmp_path):
    path = write_recipe(
        f"""
merge_method: passthrough
slices:
  - sources: [{{model: {trio["a"]}, layer_range: [0, 2]}}]
  - sources: [{{model: {trio["b"]}, layer_range: [1, 2]}}]
"""
    )
    assert run_merge(path, tmp_path / "out")[0] == 0
    stacked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(trio["a"], dtype=torch.float32)
    second = AutoModelForCausalLM.from_pretrained(trio["b"], dtype=torch.float32)
    first.model.layers.append(second.model.layers[1])
    first.model.norm = second.model.norm
    first.model.layers[2].self_attn.layer_idx = 2
    first.config.num_hidden_layers = 3
    with torch.no_grad():
        torch.testing.assert_close(stacked(TOKENS).logits, first(TOKENS).logits)


def test_fisher_by_flags(run_merge, trio, tmp_path):
    files = []
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        weights = load_file(trio[name] / "model.safetensors")
        fisher = {n: torch.rand(t.shape, generator=generator) for n, t in weights.items()}
        files.append(tmp_path / f"{name}.safetensors")
        save_file(fisher, files[-1])
    out = tmp_path / "out"
    status, _, errors = run_merge(
        *("--method", "fisher", "--models", trio["a"], trio["b"], "--fisher", *files, "--out", out),
        *("--param", "fisher_normalize=none", "--param", "fisher_floor=0"),
    )
    assert (status, errors) == (0, "")
    a, b = state_of(trio["a"]), state_of(trio["b"])
    f, g = (load_file(file) for file in files)
    assert_same(
        out,
        trio["a"],
        {n: (f[n].double() * a[n] + g[n].double() * b[n]) / (f[n].double() + g[n].double()) for n in a},
    )
    roles = [entry["role"] for entry in json.loads((out / "merge_report.json").read_text())["inputs"]]
    assert roles == ["model", "model", "fisher", "fisher"]


def test_fisher_that_does_not_cover_a_tensor_is_noted(run_merge, trio, tmp_path):
    weights = load_file(trio["a"] / "model.safetensors")
    covered = {name: torch.ones_like(tensor) for name, tensor in weights.items() if "norm" not in name}
    save_file(covered, tmp_path / "f.safetensors")
    status, _, errors = run_merge(
        *("--method", "fisher", "--models", trio["a"], trio["b"], "--out", tmp_path / "out"),
        *("--fisher", tmp_path / "f.safetensors", tmp_path / "f.safetensors"),
    )
    assert status == 0
    assert (
        "does not cover model.layers.0.input_layernorm.weight and 4 more tensors: the plain weighted mean"
        in errors
    )


def test_the_union_of_two_tokenizers(run_merge, write_recipe, trio, tmp_path):
    from tokenizers import Tokenizer

    other = tmp_path / "other"
    other.mkdir()
    for path in trio["b"].iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|tool|>"])
    tokenizer.save(str(other / "tokenizer.json"))
    state = load_file(other / "model.safetensors")
    old = state["model.embed_tokens.weight"]
    number = tokenizer.token_to_id("<|tool|>")
    state["model.embed_tokens.weight"] = torch.cat([old, torch.full((number + 1 - len(old), 64), 0.25)])
    save_file(state, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": number + 1}))
    text = (
        f"merge_method: linear\nbase_model: {trio['a']}\nparameters: {{weight: 0.5}}\n"
        f"models: [{{model: {trio['a']}}}, {{model: {other}}}]\ntokenizer_source: union\n"
    )
    out = tmp_path / "out"
    assert run_merge(write_recipe(text), out)[0] == 0
    merged = AutoTokenizer.from_pretrained(out)
    assert merged.convert_tokens_to_ids("<|tool|>") == number
    assert merged("<|tool|>").input_ids == [number]
    rows = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape == (number + 1, 64)
    assert torch.equal(
        rows[number], torch.full((64,), 0.25)
    )  # only the other model has it: both take it from there
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == number + 1
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_dry_run_needs_no_torch_and_writes_nothing(trio, write_recipe, tmp_path):
    path = write_recipe(
        f"merge_method: ties\nbase_model: {trio['a']}\nparameters: {{weight: [0, 1], density: 0.5}}\n"
        f"models: [{{model: {trio['b']}}}, {{model: {trio['c']}}}]\ntokenizer_source: union\n"
    )
    code = (
        "import sys\nfrom toolkit.cli.main import main\n"
        f"status = main(['merge', {str(path)!r}, {str(tmp_path / 'out')!r}, '--dry-run'])\n"
        "heavy = {'torch', 'transformers', 'numba', 'peft'} & sys.modules.keys()\n"
        "assert not heavy, heavy\nsys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout
    assert text.startswith("Method   ties, seed 0\n")
    assert "base " in text
    assert "weight [1, 1], density [0.5, 0.5]" in text
    assert "460 kB in 20 tensors (20 float32); model.safetensors" in text
    assert "about 0." in text
    assert text.endswith("Dry run: nothing was written.\n")
    assert not (tmp_path / "out").exists()


def test_wrong_recipes_need_no_torch(write_recipe, tmp_path):
    path = write_recipe("merge_method: tie\n")
    code = (
        "import sys\nfrom toolkit.cli.main import main\n"
        f"status = main(['merge', {str(path)!r}, 'out'])\n"
        "assert not {'torch', 'transformers', 'numba'} & sys.modules.keys()\nsys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert "did you mean 'ties'?" in result.stderr


def test_a_merge_of_files_needs_no_torch(trio, tmp_path):
    words = ["--method", "ties", "--models", str(trio["b"]), str(trio["c"]), "--base", str(trio["a"])]
    code = (
        "import sys\nfrom toolkit.cli.main import main\n"
        f"status = main(['merge', *{words!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\nsys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
