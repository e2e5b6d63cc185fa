"""Base and adapter, applied while it is read, against PEFT's merge_and_unload and against its logits."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from toolkit.errors import ModelError
from toolkit.merging.group import stored_dtype
from toolkit.merging.lora import AdaptedSource
from toolkit.merging.streaming.folder_source import FolderSource

# Kinds of adapters: (base, options of LoraConfig).
KINDS = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 3}),
    "dora": ("llama", {"use_dora": True}),
    "dora with rslora": ("llama", {"use_dora": True, "use_rslora": True, "r": 3}),
    "all linear": ("llama", {"target_modules": "all-linear", "r": 2}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 2},
            "alpha_pattern": {r"^model\.layers\.0.*v_proj": 5},
            "use_rslora": True,
        },
    ),
    "regular expression": ("llama", {"target_modules": r".*layers\.1\..*(up|down)_proj"}),
    "one layer": ("llama", {"layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "o_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved modules": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "token rows": ("llama", {"trainable_token_indices": {"embed_tokens": [5, 9, 63]}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d, bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "conv1d, embedding": ("gpt2", {"target_modules": ["wpe", "c_proj"], "r": 5}),
    "bfloat16 base": ("bf16", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_is_pefts_merged_model(
    kind, bases, make_adapter, with_adapter, logits, write_model, load, tmp_path
):
    base, options = KINDS[kind]
    folder = make_adapter(bases[base], **options)
    model = with_adapter(bases[base], folder)
    wanted, plain = logits(model), logits(load(bases[base]))
    merged = model.merge_and_unload().state_dict()
    source = AdaptedSource(FolderSource("base", bases[base]), folder)
    ours = write_model(source, tmp_path / "ours")
    changed = 0
    for name, tensor in load_file(ours / "model.safetensors").items():
        tolerance = {"rtol": 0, "atol": 2e-6} if base != "bf16" else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(tensor.float(), merged[name].float(), **tolerance)
        changed += source.reader(name).dtype != FolderSource("base", bases[base]).reader(name).dtype or (
            not torch.equal(tensor, load_file(bases[base] / "model.safetensors")[name])
        )
    assert changed > 0
    if base != "bf16":
        torch.testing.assert_close(logits(load(ours)), wanted, rtol=0, atol=3e-5)
        assert (wanted - plain).abs().max() > 3e-3


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 9]},
    ],
)
def test_tied_embeddings_part_where_the_adapter_changes_one_of_them(
    options, bases, make_adapter, with_adapter, logits, write_model, load, tmp_path
):
    folder = make_adapter(bases["tied"], **options)
    source = AdaptedSource(FolderSource("base", bases["tied"]), folder)
    stay_tied = "ensure_weight_tying" in options or "trainable_token_indices" in options
    assert source.config["tie_word_embeddings"] is stay_tied
    assert ("lm_head.weight" in source.names()) is not stay_tied
    ours = load(write_model(source, tmp_path / "ours"))
    torch.testing.assert_close(logits(ours), logits(with_adapter(bases["tied"], folder)), rtol=0, atol=3e-5)


@pytest.mark.parametrize("base", ["xlm-r", "xlm-r-mlm", "llama"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_classifier_gets_its_head_and_its_number_of_labels(
    base, use_dora, bases, make_adapter, with_adapter, logits, write_model, load, tmp_path
):
    target = ["q_proj"] if base == "llama" else ["query", "value"]
    folder = make_adapter(
        bases[base], task_type="SEQ_CLS", target_modules=target, use_dora=use_dora, num_labels=5
    )
    source = AdaptedSource(FolderSource("base", bases[base]), folder)
    wanted = logits(with_adapter(bases[base], folder, num_labels=5))
    ours = write_model(source, tmp_path / "ours")
    assert source.config["architectures"][0].endswith("ForSequenceClassification")
    assert not [name for name in source.names() if name.startswith("lm_head")]
    model = load(ours, "SEQ_CLS")
    assert model.config.num_labels == 5
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=3e-5)


def test_a_resized_vocabulary(bases, make_adapter, with_adapter, logits, write_model, load, tmp_path):
    def grow(model):
        torch.manual_seed(3)
        model.resize_token_embeddings(70)

    for base, options in (
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {}),
        ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("tied", {}),
    ):
        folder = make_adapter(bases[base], prepare=grow, **options)
        model = load(bases[base])
        grow(model)
        wanted = logits(PeftModel.from_pretrained(model, folder).eval())
        source = AdaptedSource(FolderSource("base", bases[base]), folder)
        assert source.config["vocab_size"] == 70
        ours = load(write_model(source, tmp_path / f"{base}-{len(options)}"))
        torch.testing.assert_close(logits(ours), wanted, rtol=0, atol=3e-5)
    # PEFT does not save the new rows of the head here.
    folder = make_adapter(bases["llama"], prepare=grow, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ModelError, match=r"70 tokens.*lm_head\.weight.*64"):
        AdaptedSource(FolderSource("base", bases["llama"]), folder)


def whole(reader):
    span = reader.span(0, int(np.prod(reader.shape)))
    assert span.dtype == reader.dtype
    return np.asarray(span.data)


def test_weights_and_several_adapters_add_up_around_the_one_base(bases, make_adapter, tmp_path):
    base = FolderSource("base", bases["llama"])
    options = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]}
    folders = [make_adapter(bases["llama"], seed, **options) for seed in (1, 2)]
    source = AdaptedSource(AdaptedSource(base, folders[0], 0.7), folders[1], -0.2)
    alone = [AdaptedSource(base, folder) for folder in folders]
    assert source.label == "base+adapter-0*0.7+adapter-1*-0.2"
    assert [path.name for path in source.files] == ["model.safetensors"] + ["adapter_model.safetensors"] * 2
    for name in source.names():
        theta = whole(base.reader(name)).astype(np.float64)
        first, second = (whole(one.reader(name)).astype(np.float64) for one in alone)
        wanted = theta + 0.7 * (first - theta) - 0.2 * (second - theta)
        np.testing.assert_allclose(whole(source.reader(name)), wanted, rtol=0, atol=1e-6)


def test_a_head_that_the_base_lacks_is_the_weighted_mean(bases, make_adapter):
    folders = [
        make_adapter(bases["xlm-r"], seed, task_type="SEQ_CLS", target_modules=["query"]) for seed in (1, 2)
    ]
    source = AdaptedSource(AdaptedSource(FolderSource("b", bases["xlm-r"]), folders[0], 0.3), folders[1], 0.9)
    name = "classifier.out_proj.weight"
    first, second = (
        load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}"].numpy()
        for folder in folders
    )
    wanted = (0.3 * first.astype(np.float64) + 0.9 * second) / 1.2
    np.testing.assert_allclose(whole(source.reader(name)).reshape(3, -1), wanted, rtol=0, atol=1e-7)
    source = AdaptedSource(AdaptedSource(FolderSource("b", bases["xlm-r"]), folders[0], 1), folders[1], -1)
    with pytest.raises(
        ModelError, match=r"classifier.*is not in the base, and the adapters' weights add up to 0"
    ):
        source.reader(name)


def test_a_result_has_the_type_of_the_base_whatever_the_adapter_changes(bases, make_adapter):
    def grow(model):
        model.resize_token_embeddings(70)

    base = FolderSource("base", bases["bf16"])
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folders = [make_adapter(bases["bf16"], seed, **options) for seed in (1, 2)]
    larger = [make_adapter(bases["bf16"], seed, **options, prepare=grow) for seed in (1, 2)]
    sources = [AdaptedSource(base, folder) for folder in (folders[0], larger[0])]
    sources += [AdaptedSource(AdaptedSource(base, one), two) for one, two in (folders, larger)]
    for source in sources:
        readers = [source.reader(name) for name in source.names()]
        assert "float32" in {reader.dtype for reader in readers}
        assert {stored_dtype(reader) for reader in readers} == {"bfloat16"}
    head = AdaptedSource(base, make_adapter(bases["bf16"], task_type="SEQ_CLS"))
    assert stored_dtype(head.reader("score.weight")) == "float32"  # the base has no such tensor


@pytest.mark.parametrize(
    "kind", ["plain", "dora", "conv1d, dora", "conv1d, bias", "embedding, dora", "token rows"]
)
def test_the_same_bits_in_any_pieces_and_threads(kind, bases, make_adapter, monkeypatch):
    monkeypatch.setattr(
        "toolkit.merging.lora.adapted_reader.MAX_PRODUCTS", 500
    )  # several blocks in a small tensor
    monkeypatch.setattr("toolkit.merging.lora.adapted_reader.MIN_ROWS", 3)
    base, options = KINDS[kind]
    folder = make_adapter(bases[base], **options)

    def source():
        return AdaptedSource(FolderSource("base", bases[base]), folder)

    for name in source().names():
        reader = source().reader(name)
        size = int(np.prod(reader.shape))
        wanted = whole(reader)
        for piece in (1, 7, 64, 1000):
            fresh = source().reader(name)  # DoRA's norms are computed again, by whichever thread comes first
            with ThreadPoolExecutor(4) as pool:
                starts = list(range(0, size, piece))[:200]
                spans = pool.map(lambda s, r=fresh, p=piece, n=size: r.span(s, min(p, n - s)).data, starts)
                got = np.concatenate([np.asarray(span) for span in spans])
            assert np.array_equal(got, wanted[: len(got)]), (name, piece)
        assert reader.span(0, 0).size == 0


def test_nothing_of_the_models_size_is_kept(bases, make_adapter):
    """A span of one row computes one block, not the tensor."""
    folder = make_adapter(bases["llama"], target_modules=["embed_tokens"])
    reader = AdaptedSource(FolderSource("base", bases["llama"]), folder).reader("model.embed_tokens.weight")
    asked = []
    original = reader.base

    class Watched:
        shape, dtype, where = original.shape, original.dtype, original.where

        def span(self, start, size):
            asked.append((start, size))
            return original.span(start, size)

    reader.base = Watched()
    reader._step = 8
    reader.span(33 * 32 + 5, 3)
    assert asked == [(32 * 32, 8 * 32)]


def test_it_needs_no_torch(bases, make_adapter, tmp_path):
    folder = make_adapter(bases["llama"], dtype=torch.bfloat16, use_dora=True, modules_to_save=["lm_head"])
    code = """
import sys
from pathlib import Path
from toolkit.merging.streaming.folder_source import FolderSource
from toolkit.merging.lora import AdaptedSource
source = AdaptedSource(FolderSource("b", Path(sys.argv[1])), Path(sys.argv[2]))
for name in source.names():
    source.reader(name).span(0, 8)
assert not {"torch", "peft", "transformers"} & set(sys.modules), "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code, bases["llama"], folder], check=True, timeout=60)


# --- wrong input


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 5}, r"q_proj has factors .* rank 5"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj has factors .* rank 3"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"use_dora": True}, "use_dora is True"),
    ],
)
def test_a_configuration_that_is_not_merged(changes, message, bases, make_adapter):
    folder = make_adapter(bases["llama"])
    edit(folder, **changes)
    with pytest.raises(ModelError, match=message) as error:
        AdaptedSource(FolderSource("base", bases["llama"]), folder)
    assert str(folder) in str(error.value)


def test_files_that_are_missing_damaged_or_pickles(bases, make_adapter, tmp_path):
    base = FolderSource("base", bases["llama"])
    with pytest.raises(ModelError, match="does not exist"):
        AdaptedSource(base, tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is a model, not an adapter"):
        AdaptedSource(base, bases["llama"])
    folder = make_adapter(bases["llama"])
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        AdaptedSource(base, folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="is a pickle, which can run code"):
        AdaptedSource(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        AdaptedSource(base, folder)


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[f"{Q}.lora_B.weight"].view(-1)[3].fill_(float("nan")),
            r"q_proj\.lora_B\.weight has 1 NaN",
        ),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj lacks its factor B"),
        (lambda t: t.update({f"{Q}.lora_C.weight": torch.zeros(2)}), "lora_C.weight is not known here"),
        (lambda t: t.update({"q.lora_A.weight": torch.zeros(2)}), "not a tensor of an adapter"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, 3, 3)}), "convolutions are not merged"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 31)}), r"adds \(32, 31\)"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)}), "int32"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit(change, message, bases, make_adapter):
    folder = make_adapter(bases["llama"])
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        AdaptedSource(FolderSource("base", bases["llama"]), folder)


def test_an_adapter_of_another_model(bases, make_adapter):
    folder = make_adapter(bases["llama"])
    with pytest.raises(ModelError, match=r"adapts model\.layers\.\d.* which gpt does not have"):
        AdaptedSource(FolderSource("gpt", bases["gpt2"]), folder)
