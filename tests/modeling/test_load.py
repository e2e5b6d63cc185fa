"""Bases, tokenizers, quantization and adapters."""

from types import SimpleNamespace

import pytest
import torch

from toolkit.config.recipes import CentralizedConfig
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import ModelError
from toolkit.modeling.adapters import add_adapter
from toolkit.modeling.load import load_base, load_model_config, quantization_config

CPU = SimpleNamespace(device="cpu", mixed_precision="no", quant_storage=None, zero_stage=None)


@pytest.fixture
def config(tiny_model, tmp_path):
    def make(**changes):
        values = {"model": str(tiny_model), "data": "d", "output_dir": tmp_path, "max_length": 64}
        return CentralizedConfig(**(values | changes))

    return make


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(config, dtype, expected):
    model = load_base(config(dtype=dtype), CPU)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.config.use_cache is False


def test_attention_implementation(config):
    assert load_base(config(), CPU).config._attn_implementation == "sdpa"
    assert load_base(config(attn_implementation="eager"), CPU).config._attn_implementation == "eager"


def test_max_length_over_the_positions(config):
    positions = load_model_config(config()).max_position_embeddings
    with pytest.raises(
        ModelError, match=f"{positions + 1} is longer than .* can read \\({positions} positions\\)"
    ):
        load_model_config(config(max_length=positions + 1))
    load_model_config(config(max_length=positions))


def test_a_model_that_cannot_be_reached(config):
    with pytest.raises(ModelError, match="nobody/nothing cannot be loaded"):
        load_model_config(config(model="nobody/nothing"))


def test_tokenizer_template_and_pad_token(config, tmp_path):
    tokenizer = load_tokenizer(config())
    assert tokenizer.pad_token is not None
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}!")
    replaced = load_tokenizer(config(chat_template=template))
    assert replaced.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(config(chat_template=tmp_path / "none.jinja"))


def test_quantization_options(config):
    assert quantization_config(config(), CPU) is None
    nested = quantization_config(config(load_in_4bit=True), CPU)
    assert nested.load_in_4bit
    assert nested.bnb_4bit_use_double_quant
    assert nested.bnb_4bit_quant_type == "nf4"
    assert nested.bnb_4bit_compute_dtype == torch.float32
    plain = quantization_config(config(load_in_4bit=True, nested_quant=False, quant_type="fp4"), CPU)
    assert not plain.bnb_4bit_use_double_quant
    assert plain.bnb_4bit_quant_type == "fp4"
    gpu = SimpleNamespace(device="cuda", mixed_precision="bf16", quant_storage="bfloat16", zero_stage=3)
    sharded = quantization_config(config(load_in_4bit=True), gpu)
    assert sharded.bnb_4bit_compute_dtype == sharded.bnb_4bit_quant_storage == torch.bfloat16
    assert quantization_config(config(load_in_8bit=True), CPU).load_in_8bit


def test_4bit_base_keeps_its_weights_through_an_evaluation(config):
    """bitsandbytes 0.50 repacks them on some CPUs at the first no-grad forward; gradients are wrong afterwards."""
    import bitsandbytes

    torch.manual_seed(0)
    model = add_adapter(load_base(config(load_in_4bit=True), CPU), config())
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    ids = torch.arange(5, 25)[None]

    def gradients():
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    for a, b in zip(before, gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("all-linear", 14), (["q_proj", "v_proj"], 4), (r".*\.0\..*_proj", 7), (["all-linear"], 14)],
)
def test_lora_targets(config, targets, expected):
    model = add_adapter(load_base(config(), CPU), config(lora_target_modules=targets, lora_r=4))
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    assert len(adapted) == expected
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {4}


@pytest.mark.parametrize("targets", [["q_proj", "nothing"], "nothing.*", ["proj"]])
def test_lora_targets_that_match_nothing(config, targets):
    with pytest.raises(ModelError, match="no linear layer of the model matches") as caught:
        add_adapter(load_base(config(), CPU), config(lora_target_modules=targets))
    assert "down_proj" in caught.value.hint
    with pytest.raises(ModelError, match="not a regular expression"):
        add_adapter(load_base(config(), CPU), config(lora_target_modules="("))


def test_adapter_options_reach_peft(config):
    options = {"lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.25, "use_rslora": True}
    lora = add_adapter(load_base(config(), CPU), config(**options)).peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (4, 12, 0.25, True)
    model = add_adapter(load_base(config(), CPU), config(use_dora=True, lora_modules_to_save=["lm_head"]))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_magnitude_vector" in name for name in names)
    assert any("lm_head.modules_to_save" in name for name in names)
