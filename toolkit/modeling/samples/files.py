"""The files of a Hugging Face model folder, written without torch or transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(path: Path, tensors: Mapping[str, np.ndarray], *, dtype: str) -> None:
    """Write fp32 arrays as one safetensors file.

    The format: 8 bytes with the header's length (little endian), the header in JSON, the values one after
    another. safetensors' own writer for numpy has no bfloat16.

    Args:
        path: the file.
        tensors: name to float32 array.
        dtype: ``float32``, or ``bfloat16``: rounded to nearest, ties to even, like torch.
    """
    code, item_bytes = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        array = tensors[name]
        if array.dtype != np.float32:
            raise TypeError(f"{name} is {array.dtype}, expected float32")
        start, end = end, end + array.size * item_bytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            values = np.ascontiguousarray(tensors[name], dtype="<f4")
            stream.write((bfloat16_bits(values) if dtype == "bfloat16" else values).data)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of finite float32 values, rounded to nearest even: uint16, same shape."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_tokenizer(folder: Path, config: Mapping[str, Any], *, chat_template: str | None = None) -> None:
    """Write tokenizer_config.json and the chat template beside a tokenizer.json that is there already."""
    write_json(folder / "tokenizer_config.json", config)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
