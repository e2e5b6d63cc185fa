"""Merged adapter folders, loaded by PEFT and compared as models."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from toolkit.errors import ConfigError, ModelError, RunDirectoryError
from toolkit.merging.lora import AdaptedSource, merge_adapter_states, merge_adapters
from toolkit.merging.streaming.folder_source import FolderSource

ALL_MODES = ("factors", "concat", "svd", "residual")
# Kinds of adapters: (base, options of LoraConfig).
KINDS = {
    "rslora, patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "dora": ("llama", {"use_dora": True}),
    "regular expression": ("llama", {"target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "saved modules": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "token rows": ("llama", {"trainable_token_indices": {"embed_tokens": [5, 9]}}),
    "conv1d, bias": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
}


def residual_base(mode, bases, base):
    return bases[base] if mode == "residual" else None


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_the_identity(kind, mode, bases, make_adapter, with_adapter, logits, tmp_path):
    base, options = KINDS[kind]
    folder = make_adapter(bases[base], **options)
    report = merge_adapters([folder], [1.0], tmp_path / "out", mode, base=residual_base(mode, bases, base))
    assert report.merged.relative_error < 1e-14
    wanted = logits(with_adapter(bases[base], folder))
    got = logits(with_adapter(report.model_folder or bases[base], report.adapter_folder))
    if mode in ("factors", "residual"):
        before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, report.adapter_folder))
        dropped = {"base_model.model.model.embed_tokens.base_layer.weight"} if mode == "residual" else set()
        dropped |= {"base_model.model.transformer.wte.base_layer.weight"} if mode == "residual" else set()
        assert after.keys() == before.keys() - dropped
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
        assert torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


EXACT_KINDS = {
    **{kind: KINDS[kind] for kind in ("rslora, patterns", "embedding", "conv1d, bias", "bfloat16")},
    "tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("mode", ["concat", "svd", "residual"])
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_three_adapters_are_the_model_with_all_of_them(
    kind, mode, bases, make_adapter, with_adapter, load, logits, write_model, tmp_path
):
    base, options = EXACT_KINDS[kind]
    folders = [make_adapter(bases[base], seed, **options) for seed in (1, 2, 3)]
    weights = [0.5, 0.9, -0.4]
    source = FolderSource("base", bases[base])
    for folder, weight in zip(folders, weights, strict=True):
        source = AdaptedSource(source, folder, weight)
    wanted = logits(load(write_model(source, tmp_path / "wanted")))
    report = merge_adapters(
        folders,
        weights,
        tmp_path / "out",
        mode,
        rank=99 if mode == "svd" else None,
        base=residual_base(mode, bases, base),
    )
    got = logits(with_adapter(report.model_folder or bases[base], report.adapter_folder))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    merged = merge_adapters(folders, weights, tmp_path / "mean", "factors")
    wrong = logits(with_adapter(bases[base], merged.adapter_folder))
    assert (wrong - wanted).abs().max() > 100 * (got - wanted).abs().max()
    assert merged.merged.relative_error > 0.1


def test_pefts_own_cat_is_ours(bases, make_adapter, logits, with_adapter, tmp_path):
    folders = [make_adapter(bases["llama"], seed, r=rank) for seed, rank in ((1, 4), (2, 3))]
    model = with_adapter(bases["llama"], folders[0])
    model.load_adapter(folders[1], "second")
    model.add_weighted_adapter(["default", "second"], [0.7, -0.2], "both", combination_type="cat")
    model.set_adapter("both")
    report = merge_adapters(folders, [0.7, -0.2], tmp_path / "out", "concat", normalize=False)
    ours = with_adapter(bases["llama"], report.adapter_folder)
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=2e-5)


def test_a_classifiers_head_is_the_mean(bases, make_adapter, logits, with_adapter, tmp_path):
    options = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    folders = [make_adapter(bases["xlm-r"], seed, **options) for seed in (1, 2)]
    report = merge_adapters(folders, [3, 1], tmp_path / "out", "svd")
    first, second, merged = (
        load_file(f / "adapter_model.safetensors") for f in (*folders, report.adapter_folder)
    )
    name = "base_model.model.classifier.out_proj.weight"
    assert torch.equal(merged[name], (0.75 * first[name].double() + 0.25 * second[name].double()).float())
    assert merged.keys() == first.keys()
    again = merge_adapters(folders, [3, 1], tmp_path / "sum", "concat", normalize=False)  # a head has no sum
    assert torch.equal(load_file(again.adapter_folder / "adapter_model.safetensors")[name], merged[name])
    assert logits(with_adapter(bases["xlm-r"], report.adapter_folder, num_labels=3)).shape == (2, 3)
    other = make_adapter(bases["xlm-r"], 3, num_labels=4, **options)
    with pytest.raises(ModelError, match=r"classifier\.out_proj\.\w+ has the shape"):
        merge_adapters([folders[0], other], None, tmp_path / "none", "svd")
    plain = make_adapter(bases["xlm-r"], 3, **options, modules_to_save=[])
    shutil.copy(folders[0] / "adapter_config.json", plain / "adapter_config.json")
    without_head(plain)
    report = merge_adapters([folders[0], plain], None, tmp_path / "half", "svd")
    assert any("classifier.dense.weight is not in every adapter" in note for note in report.facts["notes"])
    summary = report.summary()
    assert "classifier.dense.bias and 3 more whole tensors: the weighted mean" in summary
    assert [
        line for line in summary if line.startswith("note: classifier.dense.weight is not in every adapter")
    ]


def without_head(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "classifier" not in name}, path)


def test_several_dora_adapters_are_merged_with_a_note_or_not_at_all(
    bases, make_adapter, with_adapter, logits, tmp_path
):
    folders = [make_adapter(bases["llama"], seed, use_dora=True) for seed in (1, 2)]
    report = merge_adapters(folders, None, tmp_path / "out", "concat")
    assert "not the mean of the weights" in report.facts["notes"][0]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    first, second, merged = (
        load_file(f / "adapter_model.safetensors")[name] for f in (*folders, report.adapter_folder)
    )
    assert torch.equal(merged, (0.5 * first.double() + 0.5 * second.double()).float())
    logits(with_adapter(bases["llama"], report.adapter_folder))
    plain = make_adapter(bases["llama"], 3)
    for wrong, message in (
        ([folders[0], plain], "uses DoRA"),
        (
            [folders[0], make_adapter(bases["llama"], 4, use_dora=True, target_modules=["q_proj"])],
            "one DoRA adapter only",
        ),
    ):
        with pytest.raises(ModelError, match=message):
            merge_adapters(wrong, None, tmp_path / "none", "concat")
    with pytest.raises(ModelError, match="not of low rank"):
        merge_adapters(folders, None, tmp_path / "none", "residual", base=bases["llama"])


def test_adapters_of_different_targets_load_without_a_warning(bases, make_adapter, with_adapter, tmp_path):
    folders = [
        make_adapter(bases["llama"], 1, target_modules=["q_proj", "k_proj"], layers_to_transform=[0]),
        make_adapter(bases["llama"], 2, target_modules=r".*(down_proj|q_proj)", r=2, lora_alpha=3),
    ]
    report = merge_adapters(folders, None, tmp_path / "out", "svd")
    model = with_adapter(bases["llama"], report.adapter_folder)  # warnings are errors in it
    saved = get_peft_model_state_dict(model)
    assert saved.keys() == load_file(report.adapter_folder / "adapter_model.safetensors").keys()


def test_the_remainder_is_rounded_to_the_type_of_the_base(bases, make_adapter, tmp_path):
    folders = [make_adapter(bases["llama"], seed) for seed in (1, 2)]
    report = merge_adapters(folders, None, tmp_path / "out", "residual", base=bases["bf16"])
    assert report.model_folder == (tmp_path / "out" / "model").resolve()
    before, after = (load_file(f / "model.safetensors") for f in (bases["bf16"], report.model_folder))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ("q_proj", "v_proj")
    }
    config = json.loads((report.adapter_folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(report.model_folder)
    assert "% (goes into the base), rounding" in "\n".join(report.summary())


def test_the_folder_holds_report_card_and_tokenizer(bases, make_adapter, tmp_path):
    folders = [make_adapter(bases["llama"], seed) for seed in (1, 2)]
    (folders[0] / "tokenizer_config.json").write_text("{}")
    report = merge_adapters(folders, [3, 1], tmp_path / "deep" / "out", "svd", rank=2)
    out = tmp_path / "deep" / "out"
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_report.json",
        "README.md",
        "tokenizer_config.json",
    }
    facts = json.loads((out / "merge_report.json").read_text())
    assert facts["mode"] == "svd"
    assert [entry["effective_weight"] for entry in facts["inputs"]] == [0.75, 0.25]
    assert facts["relative_error"] == report.merged.relative_error > 0.1
    assert len(facts["modules"]) == 4
    assert all(entry["rank"] == 2 and 0 < entry["relative_error"] < 1 for entry in facts["modules"])
    card = (out / "README.md").read_text()
    assert "base_model: " in card
    assert f"{report.merged.relative_error:.3g}" in card
    assert (out / "adapter_model.safetensors").stat().st_mode & 0o777 == (
        out / "README.md"
    ).stat().st_mode & 0o777
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_adapters_of_different_bases_need_lenience(bases, make_adapter, tmp_path):
    folders = [make_adapter(bases["llama"], 1), make_adapter(bases["bf16"], 2)]
    with pytest.raises(ModelError, match=r"differ: base .*llama and .*bf16"):
        merge_adapters(folders, None, tmp_path / "out", "concat")
    assert not (tmp_path / "out").exists()
    report = merge_adapters(folders, None, tmp_path / "out", "concat", lenient=True)
    assert "differ: base" in report.facts["notes"][0]
    path = folders[1] / "adapter_config.json"
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    path.write_text(json.dumps({**config, "revision": "abc"}))
    with pytest.raises(ModelError, match="revision unnamed and abc"):
        merge_adapters(folders, None, tmp_path / "no", "concat")


def test_wrong_folders(bases, make_adapter, tmp_path):
    folder = make_adapter(bases["llama"])
    with pytest.raises(ConfigError, match="residual needs a base"):
        merge_adapters([folder], None, tmp_path / "out", "residual")
    with pytest.raises(ConfigError, match="no other mode takes one"):
        merge_adapters([folder], None, tmp_path / "out", "svd", base=bases["llama"])
    with pytest.raises(RunDirectoryError, match="is one of the inputs"):
        merge_adapters([folder], None, folder, "svd", overwrite=True)
    with pytest.raises(ModelError, match=r"which .*gpt2 does not have"):
        merge_adapters(
            [folder, make_adapter(bases["llama"], 2)], None, tmp_path / "out", "residual", base=bases["gpt2"]
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(RunDirectoryError, match="exists and is not empty"):
        merge_adapters([folder], None, tmp_path / "out", "svd")
    merge_adapters([folder], None, tmp_path / "out", "svd", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_another_embedding_of_the_adapters_cannot_take_the_remainder(bases, make_adapter, tmp_path):
    options = {"target_modules": ["embed_tokens"]}
    folders = [make_adapter(bases["llama"], seed, **options) for seed in (1, 2)]
    with pytest.raises(ModelError, match=r"bring another model\.embed_tokens\.weight"):
        merge_adapters(folders, None, tmp_path / "out", "residual", base=bases["tied"])


def test_folders_merge_without_torch_and_as_states_do(bases, make_adapter, with_adapter, load, tmp_path):
    folders = [make_adapter(bases["llama"], seed) for seed in (1, 2)]
    code = """
import sys
from pathlib import Path
from toolkit.merging.lora import merge_adapters
*folders, out = map(Path, sys.argv[1:])
merge_adapters(folders, [1, 2], out, "svd")
assert not {"torch", "peft", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, *folders, tmp_path / "out"], check=True, timeout=120)
    models = [with_adapter(bases["llama"], folder) for folder in folders]
    states = [get_peft_model_state_dict(model) for model in models]
    configs = [LoraConfig.from_pretrained(folder) for folder in folders]
    merged = merge_adapter_states(states, configs, [1, 2], "svd")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == merged.state().keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in merged.state().items())
    options = {key: value for key, value in merged.config.items() if key != "peft_type"}
    model = get_peft_model(load(bases["llama"]), LoraConfig(**options))
    result = set_peft_model_state_dict(model, merged.state())
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]


@pytest.mark.faults
def test_a_merge_killed_before_its_commit_leaves_nothing_under_its_name(bases, make_adapter, tmp_path):
    folders = [make_adapter(bases["llama"], seed) for seed in (1, 2)]
    code = """
import os, sys
from pathlib import Path
from toolkit.merging.lora import merge_adapters
*folders, base, out = map(Path, sys.argv[1:])
os.rename = lambda source, target: os._exit(9) if Path(target) == out else os.replace(source, target)
merge_adapters(folders, None, out, "residual", base=base)
"""
    out = tmp_path / "made" / "out"
    command = [sys.executable, "-c", code, *folders, bases["llama"], out]
    assert subprocess.run(command, check=False, timeout=120).returncode == 9
    assert not out.exists()
    assert any(path.name.startswith(".staging-") for path in out.parent.iterdir())
    report = merge_adapters(folders, None, out, "residual", base=bases["llama"])
    assert report.model_folder is not None
    assert [path.name for path in out.parent.iterdir()] == ["out"]
