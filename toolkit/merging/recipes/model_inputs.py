"""The models that a recipe names: found on this machine or in the hub's cache, opened, their tied weights followed."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.config.names import nearest
from toolkit.errors import ModelError
from toolkit.merging.group import PIECE_SIZE, Reader
from toolkit.merging.recipes.recipe import Location, ModelReference
from toolkit.merging.recipes.slices import TEXT_CONFIGS, Layers
from toolkit.merging.recipes.vocabulary import EMBEDDINGS, HEADS, ends_with
from toolkit.merging.sources import Source
from toolkit.merging.streaming.folder_source import FolderSource
from toolkit.paths import can_only_be_a_path

DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
DOWNLOADED_CODE = (*DOWNLOADED, "*.py")


def local_folder(
    location: Location, *, cache_folder: Path | None = None, download: bool = True, with_code: bool = False
) -> Path:
    """The folder of a model or adapter; a hub id is looked up in the cache, and fetched where that is allowed.

    Raises:
        ModelError: it is not there.
    """
    path = Path(location.path).expanduser()
    if path.is_dir():
        if location.revision is not None:
            raise ModelError(f"{location}: a folder has no revisions", hint="only hub ids take @REVISION")
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json and .safetensors files")
    if can_only_be_a_path(location.path):
        raise ModelError(f"there is no {path}{_neighbour(path)}")
    return _snapshot(location, cache_folder, download, DOWNLOADED_CODE if with_code else DOWNLOADED)


def _snapshot(
    location: Location, cache_folder: Path | None, download: bool, patterns: tuple[str, ...]
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            location.path,
            revision=location.revision,
            cache_dir=cache_folder,
            local_files_only=not download,
            allow_patterns=list(patterns),
        )
    except HFValidationError:
        raise ModelError(f"there is no folder {location.path}, and it is not a hub id") from None
    except Exception as error:  # many kinds: offline, unknown, gated, full disk; the message says which
        what = " ".join(str(error).split())
        reason = what if len(what) < 300 else f"{what[:296]} ..."
        place = "" if download else " in the hub's cache (a dry run fetches nothing)"
        raise ModelError(
            f"there is no folder {location.path}, and no such model{place}: {reason}",
            hint="give a folder, or a hub id that can be reached or is in the cache",
        ) from None
    return Path(folder)


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    match = nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    return f"; did you mean '{path.parent / match}'?" if match else ""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model; it may hold config.json, for the names of classes."""
    if not (folder / "adapter_config.json").is_file() or any(folder.glob("model*.safetensors")):
        return False
    return (folder / "adapter_model.safetensors").is_file() or not (folder / "config.json").is_file()


def open_source(reference: ModelReference, folders: Mapping[Location, Path]) -> Source:
    """A model with its adapters applied while it is read.

    Raises:
        ModelError: a folder holds no sound model, an adapter, or a quantised model.
    """
    folder = folders[reference.model]
    source: Source = FolderSource(str(reference.model), folder)
    if is_adapter(folder):
        raise ModelError(
            f"{folder} is an adapter, and a model is expected", hint="give BASE+ADAPTER, a model with it"
        )
    if "quantization_config" in source.config:
        kind = dict(source.config["quantization_config"] or {}).get("quant_method", "quantised")
        raise ModelError(
            f"{folder}: the weights are quantised ({kind}); a merge needs them in full precision",
            hint="merge the models that these were quantised from, then quantise the result",
        )
    for lora in reference.loras:
        from toolkit.merging.lora.adapter_source import AdaptedSource

        source = AdaptedSource(source, folders[lora])
    return source


class ModelInput:
    """One model of a merge.

    Where the output head shares its weights with the embedding, it is no tensor of its own; asked for, it reads the
    embedding.
    """

    def __init__(self, reference: ModelReference, source: Source) -> None:
        self.reference = reference
        self.source = source
        self.names = source.names()
        self._own = set(self.names)
        self._aliases = self._tied_heads()
        self.names = [name for name in self.names if name not in self._aliases]
        self.note = ""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return bool(self._aliases)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: an adapter may bring its own."""
        return getattr(self.source, "tokenizer_folder", self.source.folder)

    @cached_property
    def layers(self) -> Layers:
        return Layers(self.names, self.config)

    def actual_name(self, name: str) -> str:
        """The tensor that is read for ``name``."""
        return self._aliases.get(name, name)

    def reader(self, name: str) -> Reader | None:
        """None where the model has no such tensor."""
        name = self._aliases.get(name, name)
        return self.source.reader(name) if name in self._own else None

    def _tied_heads(self) -> dict[str, str]:
        embedding = next((name for name in self.names if ends_with(name, EMBEDDINGS)), None)
        heads = [name for name in self.names if ends_with(name, HEADS)]
        says = tie_word_embeddings(self.config)
        if embedding is None or says is False:
            return {}
        if not heads:
            # Not in the file: what another model calls its head is this embedding.
            return dict.fromkeys(HEADS, embedding)
        # transformers ties what the configuration ties, but not what a file holds twice with different values.
        if says and all(self._are_equal(head, embedding) for head in heads):
            return dict.fromkeys(heads, embedding)
        return {}

    def _are_equal(self, first: str, second: str) -> bool:
        return same_elements(self.source.reader(first), self.source.reader(second))


def tie_word_embeddings(config: Mapping[str, Any]) -> bool | None:
    """What a configuration says, in the part of the text model where it has parts; None where it says nothing."""
    for part in (config, *(config.get(key) for key in TEXT_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return part["tie_word_embeddings"]
    return None


def same_elements(first: Reader, second: Reader) -> bool:
    """Whether two tensors hold the same elements, bit for bit, in one dtype."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    size = int(np.prod(first.shape, dtype=np.int64))
    return all(
        _bytes(first, start, min(PIECE_SIZE, size - start))
        == _bytes(second, start, min(PIECE_SIZE, size - start))
        for start in range(0, size, PIECE_SIZE)
    )


def _bytes(reader: Reader, start: int, size: int) -> bytes:
    data = reader.span(start, size).data
    if not isinstance(data, np.ndarray):
        import torch

        data = data.contiguous().view(torch.uint8).numpy()
    return data.tobytes()
