"""Tiny models with random adapters, saved by PEFT, and the logits that PEFT computes with them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

INPUT_IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 4, 9, 9, 20, 21, 22, 5]])
LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    pad_token_id=0,
)
XLM_R = XLMRobertaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=40,
    type_vocab_size=1,
    pad_token_id=1,
)
GPT2 = GPT2Config(
    vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
)


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Model folders: llama, tied (a Llama with tied embeddings), xlm-r (no head), xlm-r-mlm, gpt2, bf16."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    tied = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
    models: dict[str, Any] = {
        "llama": LlamaForCausalLM(LLAMA),
        "tied": LlamaForCausalLM(tied),
        "xlm-r": XLMRobertaModel(XLM_R, add_pooling_layer=False),
        "xlm-r-mlm": XLMRobertaForMaskedLM(XLM_R),
        "gpt2": GPT2LMHeadModel(GPT2),
    }
    for model in models.values():
        for parameter in model.parameters():  # weights of a size that makes an adapter's share visible
            torch.nn.init.normal_(parameter, std=0.2)
    models["bf16"] = models["llama"]
    for name, model in models.items():
        (model.to(torch.bfloat16) if name == "bf16" else model).save_pretrained(folder / name)
    return {name: folder / name for name in models}


def load_model(base: Path, kind: str = "CAUSAL_LM", **keywords: Any) -> Any:
    auto = AutoModelForCausalLM if kind == "CAUSAL_LM" else AutoModelForSequenceClassification
    torch.manual_seed(1)  # of a new head
    return auto.from_pretrained(base, **keywords).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits.float()


MakeAdapter = Callable[..., Path]


@pytest.fixture
def make_adapter(tmp_path) -> MakeAdapter:
    """make_adapter(base, seed, prepare=function of the model, **LoraConfig) -> folder of a random adapter."""

    def make(
        base: Path,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        prepare: Callable[[Any], None] | None = None,
        num_labels: int = 3,
        **options: Any,
    ) -> Path:
        options = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
            **options,
        }
        keywords = {} if options["task_type"] == "CAUSAL_LM" else {"num_labels": num_labels}
        plain = load_model(base, options["task_type"], **keywords)
        if prepare is not None:
            prepare(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's remarks on tied and resized embeddings
            model = get_peft_model(plain, LoraConfig(**options))
            randomise(model, seed)
            model.to(dtype)
            folder = tmp_path / f"adapter-{len(list(tmp_path.glob('adapter-*')))}"
            model.save_pretrained(folder)
        return folder

    return make


def randomise(model: Any, seed: int) -> None:
    """Random values for everything that is trained; DoRA's magnitudes stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.3 * noise.tanh())
            else:
                parameter.data.mul_(0.5).add_(0.1 * noise)  # in place: tied ones stay tied


def _with_adapter(base: Path, folder: Path, **keywords: Any) -> Any:
    """PEFT's model of base and adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*embedding layer has been resized.*")
        kind = LoraConfig.from_pretrained(folder).task_type
        return PeftModel.from_pretrained(load_model(base, kind, **keywords), folder).eval()


def _write_model(source: Any, folder: Path) -> Path:
    """Save what a Source reads as a model folder."""
    folder.mkdir()
    tensors = {}
    for name in source.names():
        reader = source.reader(name)
        size = int(np.prod(reader.shape))
        span = reader.span(0, size)
        values = torch.from_numpy(np.array(span.data)).view(getattr(torch, span.dtype))
        tensors[name] = values.reshape(reader.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    return folder


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    return load_model


@pytest.fixture(scope="session")
def logits() -> Callable[[Any], torch.Tensor]:
    return _logits


@pytest.fixture(scope="session")
def with_adapter() -> Callable[..., Any]:
    return _with_adapter


@pytest.fixture(scope="session")
def write_model() -> Callable[[Any, Path], Path]:
    return _write_model
