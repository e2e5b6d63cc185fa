"""Where each tensor of the result will lie: shards, headers and offsets, known before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.errors import ModelError
from toolkit.merging.plan import OutputTensor
from toolkit.merging.streaming.safetensors_file import CARRIER, header_bytes

# What transformers asks for before it believes a file.
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor's place.

    Attributes:
        index: among all places, in the order of the files.
        tensor: what lies there.
        shard: number of its file, from 0.
        start: of its bytes in that file.
    """

    index: int
    tensor: OutputTensor
    shard: int
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its header, then its data."""

    name: str
    header: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All files of weights.

    Attributes:
        shards: in order.
        places: every tensor, in the order of the files.
        index: content of the index, or None for a single file.
        index_name: of its file.
    """

    shards: list[Shard]
    places: list[Place]
    index: dict[str, Any] | None
    index_name: str

    @property
    def num_bytes(self) -> int:
        """Of all weights files."""
        return sum(shard.num_bytes for shard in self.shards)


def lay_out(tensors: Sequence[OutputTensor], max_shard_bytes: int, weights_name: str = "model") -> Layout:
    """Distribute tensors to files as Hugging Face does: in order, a new file where the next tensor does not fit.

    Within a file, wider types come first, so that every tensor begins at a multiple of its element's size.

    Args:
        tensors: in the order in which they shall lie.
        max_shard_bytes: of tensor data; a larger tensor has a file of its own.
        weights_name: ``model`` or ``adapter_model``.

    Raises:
        ModelError: a name occurs twice.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        seen: set[str] = set()
        twice = next(t.name for t in tensors if t.name in seen or seen.add(t.name))
        raise ModelError(f"{twice} would be written twice")
    contents = _split(tensors, max_shard_bytes)
    names = [
        f"{weights_name}.safetensors"
        if len(contents) == 1
        else f"{weights_name}-{number:05}-of-{len(contents):05}.safetensors"
        for number in range(1, len(contents) + 1)
    ]
    shards: list[Shard] = []
    places: list[Place] = []
    for name, content in zip(names, contents, strict=True):
        content.sort(key=lambda tensor: -CARRIER[tensor.dtype].itemsize)
        sizes = [tensor.num_bytes for tensor in content]
        header = header_bytes(
            ((t.name, t.dtype, t.shape, n) for t, n in zip(content, sizes, strict=True)), METADATA
        )
        start = len(header)
        for tensor, num_bytes in zip(content, sizes, strict=True):
            places.append(Place(len(places), tensor, len(shards), start, num_bytes))
            start += num_bytes
        shards.append(Shard(name, header, start))
    index = None
    if len(shards) > 1:
        total = sum(place.num_bytes for place in places)
        weight_map = {place.tensor.name: shards[place.shard].name for place in places}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return Layout(shards, places, index, f"{weights_name}.safetensors.index.json")


def _split(tensors: Sequence[OutputTensor], max_shard_bytes: int) -> list[list[OutputTensor]]:
    contents: list[list[OutputTensor]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        if contents[-1] and num_bytes + tensor.num_bytes > max_shard_bytes:
            contents.append([])
            num_bytes = 0
        contents[-1].append(tensor)
        num_bytes += tensor.num_bytes
    return contents
