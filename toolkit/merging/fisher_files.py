"""Files of diagonal Fisher information as inputs of a merge: read piece by piece, no torch.

A file that meldkit wrote brings the norm and mean of each tensor in its metadata (see
:mod:`toolkit.merging.fisher.storage`), so a merge needs no extra pass. Any other safetensors file of non-negative
tensors under the names of the model's is read once for them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, isfinite, prod, sqrt
from pathlib import Path

import numpy as np

from toolkit.errors import ModelError
from toolkit.merging.group import PIECE_SIZE, FisherTensor, Reader
from toolkit.merging.streaming.safetensors_file import WeightsFile
from toolkit_kernels import dispatch
from toolkit_kernels.backend import Backend
from toolkit_kernels.reference import read
from toolkit_kernels.rules import Inputs
from toolkit_kernels.spans import CODES, ITEMSIZES, Span
from toolkit_kernels.sums import tree_sum

FORMAT = "meldkit-fisher-1"
# Elements that are measured at once on a GPU.
DEVICE_PIECE_SIZE = 1 << 24
HINT = "meldkit fisher --model MODEL --data DATA --out FILE makes such a file"


@dataclass(frozen=True, slots=True)
class FisherFile:
    """The diagonal Fisher information of one model.

    Attributes:
        path: of the file.
        kind: how it was estimated; empty where the file does not say.
        num_examples: over how many examples; None where the file does not say.
        norms: L2 norm of each tensor.
        means: mean of each tensor.
        model_norm: L2 norm over all tensors.
    """

    path: Path
    file: WeightsFile
    kind: str
    num_examples: int | None
    norms: Mapping[str, float]
    means: Mapping[str, float]
    model_norm: float

    def names(self) -> list[str]:
        """The tensors that are covered."""
        return list(self.file.header.entries)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> FisherTensor | None:
        """The Fisher of one tensor; None where the file does not cover it.

        Args:
            name: of the tensor in the model.
            shape: of the tensor in the model, to be compared.

        Raises:
            ModelError: the shape is another one.
        """
        if name not in self.norms:
            return None
        reader = self.file.reader(name)
        if shape is not None and reader.shape != tuple(shape):
            raise ModelError(
                f"{self.path}: {name} has the shape {list(reader.shape)}, and in the model {list(shape)}",
                hint="this is the Fisher information of another model",
            )
        return FisherTensor(reader, self.means[name], self.norms[name], self.model_norm)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with those of the model.

        Raises:
            ModelError: the file covers a tensor that the model has not, or has with another shape, or none of its own.
        """
        if foreign := [name for name in self.norms if name not in shapes]:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise ModelError(
                f"{self.path} holds {foreign[0]}{more}, which the model has not",
                hint="this is the Fisher information of another model",
            )
        for name in self.norms:
            self.tensor(name, shapes[name])
        if not self.norms:
            raise ModelError(f"{self.path} holds no tensor", hint=HINT)


def open_fisher(path: Path) -> FisherFile:
    """Open a file of Fisher information; where its metadata has no norms and means, it is read once.

    Raises:
        ModelError: no safetensors file, a tensor that is no floating-point one, negative, NaN or infinite, or metadata
            that does not fit the tensors.
    """
    file = WeightsFile(path)
    for name, entry in file.header.entries.items():
        if entry.dtype not in CODES:
            raise ModelError(f"{path}: {name} is of {entry.dtype}, which is no Fisher information", hint=HINT)
    metadata = file.header.metadata
    if metadata.get("format") == FORMAT:
        norms, means = (_numbers(file, key) for key in ("norms", "means"))
    else:
        measured = {name: norm_and_mean(file.reader(name), name) for name in file.header.entries}
        norms = {name: norm for name, (norm, _) in measured.items()}
        means = {name: mean for name, (_, mean) in measured.items()}
    num_examples = metadata.get("n_examples", "")
    return FisherFile(
        path,
        file,
        metadata.get("kind", ""),
        int(num_examples) if num_examples.isdecimal() else None,
        norms,
        means,
        sqrt(fsum(norm**2 for norm in norms.values())),
    )


def _numbers(file: WeightsFile, key: str) -> dict[str, float]:
    """One number of the metadata for each tensor."""
    try:
        values = json.loads(file.header.metadata[key])
        numbers = {name: float(values[name]) for name in file.header.entries}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file.path}: '{key}' in its metadata lacks or garbles {error}", hint=HINT
        ) from error
    for name, number in numbers.items():
        if not (isfinite(number) and number >= 0):
            raise ModelError(f"{file.path}: {name} has {number} among its '{key}'", hint=HINT)
    return numbers


def norm_and_mean(reader: Reader, name: str, backend: Backend | None = None) -> tuple[float, float]:
    """L2 norm and mean of a tensor, from a file or memory: |F| = sqrt(<F, F>), mean = <F, 1> / N.

    The sums are those of :meth:`Backend.gram`, in float64 (squares of Fisher values underflow in float32): the same
    bits on every device, by every backend, for any number of threads.

    Args:
        reader: of Fisher information.
        name: of the tensor, for messages.
        backend: of kernels; None for the fastest where the elements lie.

    Raises:
        ModelError: an element is negative, NaN or infinite.
    """
    size = prod(reader.shape)
    if not size:
        return 0.0, 0.0
    device = reader.span(0, 1).device
    backend = backend or dispatch.backend("auto", device)
    piece_size = PIECE_SIZE if device == "cpu" else DEVICE_PIECE_SIZE
    terms = []
    for start in range(0, size, piece_size):
        span = reader.span(start, min(piece_size, size - start))
        products = backend.gram(Inputs((span, _ones_like(span))))
        if _has_negative(span) or not np.isfinite(products).all():
            _refuse(span, reader.where, name)
        terms.append(products)
    total = tree_sum(terms)
    return sqrt(total[0, 0]), float(total[0, 1]) / size


def _ones_like(span: Span) -> Span:
    if isinstance(span.data, np.ndarray):
        return Span.of(np.ones(span.size, np.float16))
    return Span.of(span.data.new_ones(span.size))


def _has_negative(span: Span) -> bool:
    """Whether an element is below zero, or a NaN with the sign bit."""
    if not isinstance(span.data, np.ndarray):
        return bool(span.data.amin() < 0)
    num_bytes = ITEMSIZES[span.dtype]
    return int(span.data.view(f"u{num_bytes}").max()) > 1 << (8 * num_bytes - 1)


def _refuse(span: Span, where: str, name: str) -> None:
    """Name an element that no Fisher information has."""
    values = read(span)
    wrong = values[~(np.isfinite(values) & (values >= 0))]
    if not len(wrong):
        raise ModelError(f"{where}: {name} holds {values.max():g}, whose square is beyond float64", hint=HINT)
    raise ModelError(f"{where}: {name} holds {wrong[0]:g}; Fisher information is not negative", hint=HINT)
