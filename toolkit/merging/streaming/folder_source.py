"""A model folder as named tensors: single file or shards with an index, a whole model or an adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError
from toolkit.merging.group import Reader
from toolkit.merging.streaming.safetensors_file import WeightsFile
from toolkit.modeling.source import check_model_folder

# The output projection of a language model, and what it shares its weights with where the file leaves it out.
HEAD = "lm_head.weight"
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
)


class FolderSource:
    """The tensors of a folder: a Source.

    A head that is tied to the embedding, and so is not in the file, is not among the names; asked for by name, the
    embedding is read. So a tied and an untied model merge.

    Args:
        label: as the user named the model.
        folder: of a model (config.json) or an adapter (adapter_config.json, which is then ``config``).

    Attributes:
        notes: what the user should know.

    Raises:
        ModelError: the folder has no sound weights; the message names the file.
    """

    def __init__(self, label: str, folder: Path) -> None:
        self.label = label
        self.folder = folder
        self.notes: list[str] = []
        weights, weight_map = _weights(folder, self.notes)
        self.config: Mapping[str, Any] = _config(folder)
        if not weights:
            raise ModelError(f"{folder} has no .safetensors weights")
        files = [WeightsFile(path) for path in weights]
        self.files = tuple(file.path for file in files)
        self._file_of: dict[str, WeightsFile] = {}
        for file in files:
            for name in file.header.entries:
                if weight_map is not None and weight_map.get(name) != file.path.name:
                    raise ModelError(f"{file.path} holds {name}, which {folder}'s index does not say")
                self._file_of[name] = file
        if missing := sorted((weight_map or {}).keys() - self._file_of.keys()):
            raise ModelError(
                f"{folder / (weight_map or {})[missing[0]]} lacks {missing[0]}, which the index says it holds"
                + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        self._tied = self._tied_to()

    def names(self) -> list[str]:
        return list(self._file_of)

    def reader(self, name: str) -> Reader:
        if name not in self._file_of and name == HEAD and self._tied is not None:
            name = self._tied
        return self._file_of[name].reader(name)

    def _tied_to(self) -> str | None:
        if self.config.get("tie_word_embeddings", True) is not True:
            return None
        return next((name for name in EMBEDDINGS if name in self._file_of), None)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").is_file():
        check_model_folder(folder)
        path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config


def _weights(folder: Path, notes: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """Files in order, and the map from tensors to file names where there is an index.

    A single file comes before an index, as in transformers' from_pretrained.
    """
    for stem in ("model", "adapter_model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        weight_map = _weight_map(index) if index.is_file() else None
        if single.is_file() and set((weight_map or {}).values()) <= {single.name}:
            return [single], weight_map or None
        if single.is_file():
            notes.append(
                f"{folder} has {single.name} and shards with {index.name}: the single file is read, which"
                " transformers loads too"
            )
            return [single], None
        if weight_map is not None:
            return [folder / name for name in sorted(set(weight_map.values()))], weight_map
    found = sorted(folder.glob("*.safetensors"))
    if len(found) < 2:
        return found, None
    raise ModelError(
        f"{folder} has {len(found)} .safetensors files and no index that says which belong to the model",
        hint="shards need model.safetensors.index.json",
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is not a shard index: {error}") from error
    for name in names:
        # A path in it would lead out of the folder.
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ModelError(f"{index} names the file {name!r}, which is not in the model's own folder")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing: the model is incomplete")
    return weight_map
