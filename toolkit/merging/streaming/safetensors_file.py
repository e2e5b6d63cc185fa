"""The safetensors format, read strictly and written with aligned data. No torch.

    8 bytes   N, little endian
    N bytes   JSON {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"k": "v"}}
    rest      the tensors' bytes one after the other, without holes or overlaps; offsets count from here

Elements are read through a private mapping of the file: a span of it costs no copy, several passes cost no system call,
and its pages belong to the page cache, not to this process. A file that was replaced or cut off is noticed before each
span; one that is cut off by another process while a kernel reads it ends this process with SIGBUS, which no mapping can
prevent.
"""

import errno
import hashlib
import json
import mmap
import os
import stat
import struct
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import MergeError, ModelError
from toolkit_kernels.spans import CARRIERS, Span

# Names of dtypes in a header, and torch's.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
CODES = {name: code for code, name in DTYPES.items()}
# The numpy type that carries elements in memory; bfloat16 as its bit patterns.
CARRIER = {name: np.dtype(CARRIERS.get(name, name)) for name in DTYPES.values()}
# numpy made for a processor of the other byte order would read every number wrongly.
assert sys.byteorder == "little"

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 64
MAX_NAME_LENGTH = 512
ALIGNMENT = 64
LARGEST = 1 << 63
METADATA_NAME = "__metadata__"

# Not in Python 3.11's mmap. Without it the kernel refuses to map a file larger than memory and swap as writable.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64") else 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: torch's name.
        shape: as in the header.
        start: of its bytes, from the beginning of the file.
        num_bytes: of its elements.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells that a file is still the one that was looked at. Not its content: that would be read once more."""

    path: Path
    device: int
    inode: int
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path, descriptor: int | None = None) -> "FileIdentity":
        status = os.stat(path if descriptor is None else descriptor)
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @classmethod
    def found(cls, path: Path) -> "FileIdentity":
        """Raises ModelError where there is no such file."""
        try:
            return cls.of(path)
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from error

    def check(self, descriptor: int | None = None) -> None:
        """Raises MergeError if the file was replaced or written since."""
        try:
            same = FileIdentity.of(self.path, descriptor) == self
        except OSError:
            same = False
        if not same:
            raise MergeError(
                f"{self.path} was changed or removed while it was being merged",
                hint="merge again when nothing writes to it",
            )


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says that it holds; checked against its size.

    Attributes:
        entries: tensors by name, in the order of their bytes.
        metadata: text by text.
        identity: of the file that was read.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    identity: FileIdentity


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; of the data nothing is read.

    Raises:
        ModelError: the file is not there, is no safetensors file or is damaged; the message names file and tensor.
    """
    text, identity = _text(path)
    data_start = 8 + len(text)
    values = _parsed(path, text)
    metadata = _metadata(path, values.pop(METADATA_NAME, {}))
    if len(values) > MAX_TENSORS:
        raise _damaged(path, f"{len(values):,} tensors; at most {MAX_TENSORS:,} are read")
    entries = {name: _entry(path, name, value, data_start) for name, value in values.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    _check_places(path, entries, data_start, identity.num_bytes)
    return Header(entries, metadata, identity)


def header_sha256(path: Path) -> str:
    """SHA-256 of the JSON of a file: names, shapes and places of its tensors."""
    return hashlib.sha256(_text(path)[0]).hexdigest()


def _text(path: Path) -> tuple[bytes, FileIdentity]:
    """The JSON of a file, not looked into."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ModelError(f"{path} is not a file")
        identity = FileIdentity.of(path, descriptor)
        start = os.pread(descriptor, 8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, identity.num_bytes - 8):
            raise _damaged(path, f"a header of {length:,} bytes in a file of {identity.num_bytes:,}")
        return os.pread(descriptor, length, 8), identity
    finally:
        os.close(descriptor)


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is not a sound safetensors file: {what}", hint="fetch or save the file again")


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
        return values

    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise _damaged(path, "its header is not a JSON object")
    return values


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(path, f"{METADATA_NAME} does not map text to text")
    return value


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise _damaged(path, f"a tensor is called {name[:80]!r}")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name} has not exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        hint = "dequantize the model first" if str(code).startswith(("F8", "F4", "F6", "E")) else None
        raise ModelError(f"{path}: {name} is of the type {code!r}, which cannot be merged", hint=hint)
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, f"{name} has the shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name} has the offsets {str(offsets)[:80]}")
    dtype, num_bytes = DTYPES[code], offsets[1] - offsets[0]
    if prod(shape) * CARRIER[dtype].itemsize != num_bytes:
        raise _damaged(path, f"{name} of shape {shape} and type {code} takes {num_bytes:,} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110 - a generator takes three times as long, and there are 20,000 tensors
        if type(value) is not int or not 0 <= value < LARGEST:
            return False
    return True


def _check_places(path: Path, entries: Mapping[str, TensorEntry], data_start: int, num_bytes: int) -> None:
    place = data_start
    for name, entry in entries.items():
        if entry.start != place:
            raise _damaged(
                path, f"{name} {'overlaps' if entry.start < place else 'leaves a hole after'} its neighbour"
            )
        place += entry.num_bytes
    if place != num_bytes:
        what = "is cut off" if place > num_bytes else "has bytes that belong to no tensor"
        raise _damaged(path, f"it {what}: {num_bytes:,} bytes, {place:,} expected")


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """Everything of a file before its data, which then begins at a multiple of 64 bytes.

    Args:
        tensors: (name, torch's dtype, shape, bytes) in the order of the data.
        metadata: text by text.
    """
    values: dict[str, Any] = {METADATA_NAME: dict(metadata)} if metadata else {}
    place = 0
    for name, dtype, shape, num_bytes in tensors:
        values[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (place, place + num_bytes)}
        place += num_bytes
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _unreadable(path: Path, error: OSError) -> MergeError:
    is_limit = error.errno in (errno.EMFILE, errno.ENFILE)
    hint = "allow more open files: ulimit -n 65536" if is_limit else None
    return MergeError(f"{path} cannot be read: {error.strerror}", hint=hint)


class WeightsFile:
    """A safetensors file whose tensors can be read. Mapped at the first read, unmapped when nothing refers to it.

    Args:
        path: of the file.

    Raises:
        ModelError: see :func:`read_header`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.num_bytes = self.header.identity.num_bytes
        self._map: mmap.mmap | None = None
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def reader(self, name: str) -> "FileReader":
        """Raises KeyError where there is no such tensor."""
        entry = self.header.entries[name]
        carrier = CARRIER[entry.dtype]
        return FileReader(entry.shape, entry.dtype, str(self.path), self, entry.start, carrier)

    def mapping(self) -> mmap.mmap:
        """The whole file; its size has just been checked."""
        mapping = self._map or self._mapped()
        if mapping.size() != self.num_bytes:  # touching a page behind the end would be SIGBUS
            raise MergeError(f"{self.path} was cut off or extended while it was being merged")
        return mapping

    def descriptor(self) -> int:
        """Of the open file; it is closed when nothing refers to this object."""
        with self._lock:
            if self._descriptor is None:
                descriptor = self._opened()
                weakref.finalize(self, os.close, descriptor)
                self._descriptor = descriptor
            return self._descriptor

    def _opened(self) -> int:
        """A new descriptor of the file whose header was read."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        try:
            self.header.identity.check(descriptor)
        except MergeError:
            os.close(descriptor)
            raise
        return descriptor

    def _mapped(self) -> mmap.mmap:
        with self._lock:
            if self._map is None:
                descriptor = self._opened()
                try:
                    self._map = mmap.mmap(
                        descriptor,
                        self.num_bytes,
                        flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE,  # torch warns of arrays that cannot be written
                    )
                except OSError as error:  # a mapping keeps a descriptor of its own
                    raise _unreadable(self.path, error) from error
                finally:
                    os.close(descriptor)
                self._map.madvise(mmap.MADV_SEQUENTIAL)
            return self._map


@dataclass(frozen=True, slots=True)
class FileReader:
    """One tensor of a safetensors file: a Reader."""

    shape: tuple[int, ...]
    dtype: str
    where: str
    file: WeightsFile
    place: int
    carrier: np.dtype[Any]

    def span(self, start: int, size: int) -> Span:
        if size == 0:
            return Span(np.empty(0, self.carrier), self.dtype)
        itemsize = self.carrier.itemsize
        place = self.place + start * itemsize
        values = np.frombuffer(self.file.mapping(), self.carrier, size, place)
        # The format promises no alignment. The mapping itself begins at a page.
        return Span(values.copy() if place % itemsize else values, self.dtype)

    def read(self, start: int, size: int, memory: NDArray[np.uint8]) -> Span:
        """The same elements copied into ``memory``, whose first bytes are used.

        Where elements are read once this is faster than a mapping, whose pages must be entered in a table and taken
        out of it again.
        """
        num_bytes = size * self.carrier.itemsize
        target = memory[:num_bytes]
        place = self.place + start * self.carrier.itemsize
        try:
            num_read = os.preadv(self.file.descriptor(), [target.data], place)
        except OSError as error:
            raise _unreadable(self.file.path, error) from error
        if num_read != num_bytes:
            raise MergeError(f"{self.where} was cut off while it was being merged")
        return Span(target.view(self.carrier), self.dtype)
