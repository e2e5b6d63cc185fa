"""Where a base model comes from, and what is checked before any of its files is believed.

Weights come from safetensors (or GGUF), never from a pickle; a shard index may only name files of its own folder
(transformers follows ``../`` and absolute paths in it).
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError
from toolkit.modeling.samples.catalog import sample_folder
from toolkit.paths import can_only_be_a_path


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Arguments for ``from_pretrained``.

    Attributes:
        name: hub id, or the folder as text.
        gguf_file: file name inside the folder, where the model is a GGUF file.
        is_local: whether it lies on this machine.
    """

    name: str
    gguf_file: str | None
    is_local: bool

    def keywords(self, *, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
        keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if revision is not None:
            keywords["revision"] = revision
        if self.gguf_file is not None:
            keywords["gguf_file"] = self.gguf_file
        return keywords


def find_model(model: str) -> ModelSource:
    """Tell a folder, a GGUF file and a hub id apart and check what lies on this machine.

    Raises:
        ModelError: the path does not exist, or is not a model that may be loaded.
        InputError: ``sample:NAME`` with an unknown name.
    """
    path = sample_folder(model) or Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return ModelSource(str(path.parent), path.name, True)
    if path.is_dir():
        check_model_folder(path)
        return ModelSource(str(path), None, True)
    if can_only_be_a_path(model):
        raise ModelError(f"{model} does not exist", hint=_neighbours(path))
    return ModelSource(model, None, False)


def check_model_folder(folder: Path) -> None:
    """Raises ModelError unless the folder has a config, safetensors weights and a harmless shard index."""
    if not (folder / "config.json").is_file():
        gguf = sorted(p.name for p in folder.glob("*.gguf"))
        if (folder / "adapter_config.json").is_file():
            hint = "this folder is an adapter; give its base model"
        else:
            hint = f"give the file itself: {folder / gguf[0]}" if gguf else "a model folder has config.json"
        raise ModelError(f"{folder} has no config.json", hint=hint)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        _check_index(index)
    elif not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = None
        if pickles:
            hint = f"{pickles[0]} is a pickle, which can run code; save the model again as safetensors"
        raise ModelError(f"{folder} has no .safetensors weights", hint=hint)


def _check_index(index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a shard index: {error}") from error
    for shard in sorted(shards):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise ModelError(f"{index} names the file {shard!r}, which is not in the model's own folder")
        if not (index.parent / shard).is_file():
            raise ModelError(f"{index.parent / shard} is missing: the model is incomplete")


def _neighbours(path: Path) -> str | None:
    parent = path.parent
    if not parent.is_dir():
        return "`meldkit models` lists models that can be made here from packages"
    names = sorted(p.name for p in parent.iterdir() if p.is_dir() or p.suffix == ".gguf")[:8]
    return f"in {parent} there are: {', '.join(names)}" if names else None


NUM_SAMPLED_BLOCKS = 64


def model_fingerprint(source: ModelSource, revision: str | None, commit: str | None) -> str:
    """What identifies the base of a run, in a form that can be compared after a resume.

    Of a folder: SHA-256 over configuration, tokenizer, and of each weights file its size, its header (names, shapes,
    places) and 64 blocks spread over it, which takes milliseconds for models of any size. Of a hub id: the id and the
    commit.
    """
    if not source.is_local:
        return f"{source.name}@{commit or revision or 'main'}"
    digest = hashlib.sha256()
    for path in sorted(Path(source.name).iterdir()):
        if path.name == source.gguf_file or path.suffix == ".safetensors":
            digest.update(f"{path.name}:{path.stat().st_size}".encode() + _sampled(path))
        elif path.name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    with open(path, "rb") as stream:
        start = stream.read(8)
        is_safetensors = path.suffix == ".safetensors" and len(start) == 8
        header = stream.read(min(struct.unpack("<Q", start)[0], 100_000_000) if is_safetensors else 65536)
        blocks = []
        for number in range(NUM_SAMPLED_BLOCKS):
            stream.seek(path.stat().st_size * number // NUM_SAMPLED_BLOCKS)
            blocks.append(stream.read(4096))
    return start + header + b"".join(blocks)
