"""A state cut into buckets of a few megabytes, each of which one rank merges for all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# Where a tensor begins in a buffer: aligned for every dtype.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Kind:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def size(self) -> int:
        return prod(self.shape)

    def as_json(self) -> list[object]:
        return [list(self.shape), str(self.dtype).removeprefix("torch.")]

    @classmethod
    def from_json(cls, value: Sequence[object]) -> "Kind":
        shape, dtype = value
        return cls(tuple(shape), getattr(torch, str(dtype)))  # pyright: ignore[reportArgumentType] - a list of ints


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements ``start`` to ``stop`` of the flattened tensor ``name``; all of it where ``stop`` is its size."""

    name: str
    start: int
    stop: int


Bucket = Sequence[Stretch]


def cut(
    units: Sequence[Sequence[str]], kinds: Mapping[str, Kind], *, num_bytes: int, divisible: bool
) -> list[list[Stretch]]:
    """Buckets of about ``num_bytes`` each.

    Args:
        units: names that must stay together.
        kinds: of all names.
        num_bytes: of a bucket; a unit that cannot be cut may be larger.
        divisible: whether a tensor that is alone in its unit may be cut.
    """
    buckets: list[list[Stretch]] = [[]]
    used = 0
    for unit in units:
        for stretches in _stretches(unit, kinds, num_bytes, divisible):
            size = sum(_num_bytes(stretch, kinds) for stretch in stretches)
            is_cut = any(stretch.start for stretch in stretches)
            if buckets[-1] and (used + size > num_bytes or is_cut):
                buckets.append([])
                used = 0
            buckets[-1] += stretches
            used += size
    return [bucket for bucket in buckets if bucket]


def _stretches(
    unit: Sequence[str], kinds: Mapping[str, Kind], num_bytes: int, divisible: bool
) -> Iterator[list[Stretch]]:
    kind = kinds[unit[0]]
    length = max(num_bytes // kind.dtype.itemsize, 1)
    if len(unit) > 1 or not divisible or kind.size <= length or not kind.dtype.is_floating_point:
        yield [Stretch(name, 0, kinds[name].size) for name in unit]
        return
    for start in range(0, kind.size, length):
        yield [Stretch(unit[0], start, min(start + length, kind.size))]


def _num_bytes(stretch: Stretch, kinds: Mapping[str, Kind]) -> int:
    return (stretch.stop - stretch.start) * kinds[stretch.name].dtype.itemsize


class Layout:
    """Where the stretches of a bucket lie in one buffer of bytes.

    Args:
        bucket: the stretches; those whose names ``kinds`` lacks are left out.
        kinds: of the tensors.
    """

    def __init__(self, bucket: Bucket, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._places: list[tuple[Stretch, int]] = []
        self.num_bytes = 0
        for stretch in bucket:
            if stretch.name in kinds:
                self._places.append((stretch, self.num_bytes))
                size = _num_bytes(stretch, kinds)
                self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def pack(self, state: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Copy a state's elements into the buffer [num_bytes]."""
        self._fill(buffer, {s: state[s.name].reshape(-1)[s.start : s.stop] for s, _ in self._places})

    def pack_part(self, part: Mapping[str, Tensor], buffer: Tensor) -> None:
        """The same of tensors that hold the bucket's elements only."""
        self._fill(buffer, {stretch: part[stretch.name].reshape(-1) for stretch, _ in self._places})

    def unpack(self, buffer: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The tensors, views of the buffer where it lies on ``device``; stretches of cut ones are flat."""
        tensors = {}
        for stretch, view in self._views(buffer):
            kind = self._kinds[stretch.name]
            whole = stretch.stop - stretch.start == kind.size
            tensors[stretch.name] = (view.reshape(kind.shape) if whole else view).to(device)
        return tensors

    def write(self, buffer: Tensor, state: Mapping[str, Tensor]) -> None:
        """Copy the buffer's elements into tensors of whole shape."""
        for stretch, view in self._views(buffer):
            state[stretch.name].view(-1)[stretch.start : stretch.stop].copy_(view)

    def _fill(self, buffer: Tensor, flat: Mapping[Stretch, Tensor]) -> None:
        for stretch, view in self._views(buffer):
            view.copy_(flat[stretch])

    def _views(self, buffer: Tensor) -> Iterator[tuple[Stretch, Tensor]]:
        for stretch, place in self._places:
            size = _num_bytes(stretch, self._kinds)
            yield stretch, buffer[place : place + size].view(self._kinds[stretch.name].dtype)


class Buffers:
    """Memory for buckets, used again in every turn: what is allocated and freed thousands of times in a thread of its
    own comes back to the system late, and would add up to copies of the state."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self._used = 0

    def reset(self) -> None:
        """All buffers are free again."""
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], of any content."""
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        if self._buffers[self._used].numel() < num_bytes:
            self._buffers[self._used] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._used += 1
        return self._buffers[self._used - 1][:num_bytes]


def part_of(state: Mapping[str, Tensor], bucket: Bucket) -> dict[str, Tensor]:
    """The bucket's tensors that a state has which is here, shaped like those of :meth:`Layout.unpack`."""
    tensors = {}
    for stretch in bucket:
        if stretch.name not in state:
            continue
        tensor = state[stretch.name]
        if stretch.stop - stretch.start < tensor.numel():
            tensor = tensor.reshape(-1)[stretch.start : stretch.stop]
        tensors[stretch.name] = tensor
    return tensors
