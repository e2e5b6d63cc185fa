"""The two files of an adapter folder: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import ModelError
from toolkit.merging.lora.arrays import Array
from toolkit.merging.streaming.safetensors_file import WeightsFile, header_bytes
from toolkit_kernels.spans import CODES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as a dictionary.

    Raises:
        ModelError: missing, or not a JSON object.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = "an adapter folder holds adapter_config.json and adapter_model.safetensors, as PEFT saves them"
        if (folder / "config.json").is_file():
            hint = "this folder is a model, not an adapter"
        raise ModelError(f"{path} is missing" if folder.is_dir() else f"{folder} does not exist", hint=hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def read_tensors(folder: Path) -> dict[str, Array]:
    """The tensors of adapter_model.safetensors by name, in the order of their places; mapped, not loaded.

    Raises:
        ModelError: missing, a pickle, damaged, or a tensor is not floating-point.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        hint = None
        if (folder / PICKLE_NAME).is_file():
            hint = f"{PICKLE_NAME} is a pickle, which can run code; load it with PEFT and save it again"
        raise ModelError(f"{path} is missing", hint=hint)
    file = WeightsFile(path)
    tensors = {}
    for name, entry in file.header.entries.items():
        if entry.dtype not in CODES:
            raise ModelError(f"{path}: {name} is {entry.dtype}; adapters hold floating-point tensors")
        span = file.reader(name).span(0, prod(entry.shape))
        tensors[name] = Array(span.data.reshape(entry.shape), entry.dtype)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write a safetensors file; larger element types first, so that every tensor lies aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].values.itemsize, item[0]))
    entries = ((name, array.dtype, array.shape, array.values.nbytes) for name, array in ordered)
    with open(path, "wb") as stream:
        stream.write(header_bytes(entries, {"format": "pt"}))
        for _, array in ordered:
            stream.write(np.ascontiguousarray(array.values).tobytes())
