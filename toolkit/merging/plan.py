"""What a merge will do, decided before anything is written: every tensor of the result with its readers and method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from toolkit.merging.group import FisherTensor, Reader
from toolkit.merging.registry import MergeMethod
from toolkit.merging.streaming.safetensors_file import FileIdentity
from toolkit_kernels.spans import ITEMSIZES


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the result.

    Attributes:
        name: in the output file.
        shape: of the result and of every reader.
        dtype: of the result.
        models: K readers; one for a tensor that is copied.
        base: theta_0 of methods that work on deltas.
        fisher: as in TensorGroup.
        method: None where the first reader is copied bit for bit (integers, a tensor that only one model has).
        parameters: keyword arguments of the method's function, resolved for this tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    models: tuple[Reader, ...]
    base: Reader | None = None
    fisher: tuple[FisherTensor | None, ...] = ()
    method: MergeMethod | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * (ITEMSIZES.get(self.dtype) or OTHER_ITEMSIZES[self.dtype])


# Types that are copied, never merged.
OTHER_ITEMSIZES = {
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class InputModel:
    """A model that goes into the merge: for the report, and so that a resumed merge sees the same files.

    Attributes:
        label: as the user named it.
        role: "model", "base", "adapter", "fisher", "tokenizer", or the parameter that names a file ("gram").
        files: the weights that are read.
        identities: of these files, when the merge was planned.
    """

    label: str
    role: str
    files: tuple[Path, ...]
    identities: tuple[FileIdentity, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ModelError where a file is missing."""
        object.__setattr__(self, "identities", tuple(FileIdentity.found(path) for path in self.files))


@dataclass(frozen=True)
class MergePlan:
    """All of a merge.

    Attributes:
        tensors: of the result, in the order of the output files.
        inputs: what is read.
        method: name of the method, or of the methods.
        seed: of random masks.
        settings: the recipe as the user gave it, for report and card.
        notes: what the user should know (a tensor that only one model has, a parameter that is not used).
        write_companions: writes everything but weights (config, tokenizer, card) into the staged folder.
        depends_on: folders of models and adapters, and other files, that the result depends on beside ``inputs``: they
            must not be the output, and a resumed merge must find them as they were.
    """

    tensors: list[OutputTensor]
    inputs: list[InputModel]
    method: str
    seed: int
    settings: Mapping[str, Any]
    notes: list[str]
    write_companions: Callable[[Path], None]
    depends_on: tuple[Path, ...] = ()

    @property
    def bytes_read(self) -> int:
        """Bytes of all readers' tensors, each once."""
        return sum(
            tensor.size * sum(ITEMSIZES.get(reader.dtype, 8) for reader in tensor_readers(tensor))
            for tensor in self.tensors
        )

    @property
    def bytes_written(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def tensor_readers(tensor: OutputTensor) -> list[Reader]:
    """Every reader that a tensor of the result needs."""
    readers = list(tensor.models)
    if tensor.base is not None:
        readers.append(tensor.base)
    return readers + [entry.reader for entry in tensor.fisher if entry is not None]
