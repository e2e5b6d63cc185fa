"""Tiny models with random weights and a real small tokenizer: always the same bytes, at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from toolkit.modeling.samples.e5 import XLM_R_TOKENIZER
from toolkit.modeling.samples.files import write_json, write_tokenizer, write_weights

if TYPE_CHECKING:
    from toolkit.modeling.samples.catalog import SampleModel

SEED = 20
MAX_LENGTH = 512
NUM_LAYERS = 2
HIDDEN_SIZE = 64
INNER_SIZE = 128
VOCABULARY_SIZE = 640

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CORPUS = """
turn on the light in the kitchen. turn off the lamp in the living room.
what is the temperature in the bedroom? open the curtains, close the garage door.
set the volume to fifty percent.
pause the music and play the next song. what time is it? what is the weather like tomorrow?
start a timer for ten minutes. add milk to the shopping list.
allume la lumière de la cuisine. éteins la lampe du salon. quelle est la température dans la chambre ?
schalte das Licht in der Küche ein. mach die Lampe im Wohnzimmer aus. wie warm ist es im Schlafzimmer?
enciende la luz de la cocina. apaga la lámpara del salón. ¿qué temperatura hace en el dormitorio?
ndize dritën në kuzhinë. fike llambën në dhomën e ndenjes. sa është temperatura në dhomën e gjumit?
You are a helpful assistant. Answer with one line of JSON.
{"intent": "HassTurnOn", "name": "lamp", "area": "kitchen"}
The capital of France is Paris. One and one is two.
A model is trained on one part of the data and tested on another.
"""
"""What the tokenizer is trained on. Every byte has a token of its own besides, so any text can be encoded."""


def build(model: "SampleModel", _sources: Sequence[Path], folder: Path) -> None:
    """Write the files of ``tiny-llama`` or ``tiny-xlm-r`` into ``folder``."""
    (_build_llama if model.name == "tiny-llama" else _build_xlm_r)(folder)


def _build_llama(folder: Path) -> None:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _tokenizer(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    num_heads, num_kv_heads = 4, 2
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": INNER_SIZE,
        "max_position_embeddings": MAX_LENGTH,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY_SIZE,
        **special,
    }
    write_weights(
        folder / "model.safetensors",
        _random(_llama_shapes(HIDDEN_SIZE // num_heads * num_kv_heads)),
        dtype="float32",
    )
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", special)
    tokenizer_config = {
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": MAX_LENGTH,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_tokenizer(folder, tokenizer_config, chat_template=CHATML_TEMPLATE)


def _llama_shapes(key_rows: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY_SIZE, HIDDEN_SIZE),
        "model.norm.weight": (HIDDEN_SIZE,),
    }
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN_SIZE,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN_SIZE,)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (HIDDEN_SIZE, HIDDEN_SIZE)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (key_rows, HIDDEN_SIZE)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (key_rows, HIDDEN_SIZE)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN_SIZE, HIDDEN_SIZE)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (INNER_SIZE, HIDDEN_SIZE)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INNER_SIZE, HIDDEN_SIZE)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN_SIZE, INNER_SIZE)
    return shapes


def _build_xlm_r(folder: Path) -> None:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = _tokenizer(specials)
    template = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.post_processor = template
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "dtype": "float32",
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": HIDDEN_SIZE,
        "initializer_range": 0.02,
        "intermediate_size": INNER_SIZE,
        "layer_norm_eps": 1e-5,
        # Positions are counted from 2.
        "max_position_embeddings": MAX_LENGTH + 2,
        "model_type": "xlm-roberta",
        "num_attention_heads": 4,
        "num_hidden_layers": NUM_LAYERS,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": VOCABULARY_SIZE,
    }
    write_weights(folder / "model.safetensors", _random(_xlm_r_shapes()), dtype="float32")
    write_json(folder / "config.json", config)
    write_tokenizer(folder, XLM_R_TOKENIZER | {"model_max_length": MAX_LENGTH})


def _xlm_r_shapes() -> dict[str, tuple[int, ...]]:
    square, vector = (HIDDEN_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE,)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY_SIZE, HIDDEN_SIZE),
        "embeddings.position_embeddings.weight": (MAX_LENGTH + 2, HIDDEN_SIZE),
        "embeddings.token_type_embeddings.weight": (1, HIDDEN_SIZE),
        "embeddings.LayerNorm.weight": vector,
        "embeddings.LayerNorm.bias": vector,
    }
    parts = {
        **{f"attention.self.{part}": square for part in ("query", "key", "value")},
        "attention.output.dense": square,
        "attention.output.LayerNorm": vector,
        "intermediate.dense": (INNER_SIZE, HIDDEN_SIZE),
        "output.dense": (HIDDEN_SIZE, INNER_SIZE),
        "output.LayerNorm": vector,
    }
    for layer in range(NUM_LAYERS):
        for part, shape in parts.items():
            shapes[f"encoder.layer.{layer}.{part}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{part}.bias"] = shape[:1]
    return shapes


def _tokenizer(specials: list[str]) -> Any:
    """Train byte-level BPE on :data:`CORPUS`; the special tokens get the first ids, in order."""
    tokenizer: Any = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The stubs of tokenizers lack these arguments, and the setters above.
    trainer = cast(Any, trainers.BpeTrainer)(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.strip().splitlines(), trainer)
    return tokenizer


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return weights as a fresh model has them: normal(0, 0.02), norms 1, biases 0; by :data:`SEED`."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    tensors = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(".bias"):
            tensors[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = (generator.standard_normal(shape) * 0.02).astype(np.float32)
    return tensors
