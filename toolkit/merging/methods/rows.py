"""Passes over a tensor in torch, a few rows at a time: for methods whose formula is not one of the kernels' rules.

Legend: K models, R rows of C elements (C the last dimension; a tensor of one dimension is one row), all in float64.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from toolkit.merging.group import Reader, TensorGroup
from toolkit_kernels.rules import Floats
from toolkit_kernels.spans import Span

# Elements of one model in a block: 1 MB in float64. Larger blocks are memory that the system has to clear each time.
BLOCK_ELEMENTS = 1 << 17


class Rows(NamedTuple):
    """Consecutive rows.

    Attributes:
        start: index of the first element in the flattened tensor.
        theta_KRC: the models.
        base_RC: the base.
    """

    start: int
    theta_KRC: torch.Tensor
    base_RC: torch.Tensor | None

    @property
    def delta_KRC(self) -> torch.Tensor:
        """theta_k - theta_0; theta_k where there is no base."""
        return self.theta_KRC if self.base_RC is None else self.theta_KRC - self.base_RC


def length_of_rows(group: TensorGroup) -> int:
    """C; one for a tensor of no dimension."""
    return group.shape[-1] if group.shape else 1


def read(span: Span, device: str) -> torch.Tensor:
    """[N] float64."""
    values = span.data
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values).view(getattr(torch, span.dtype))
    return values.to(device, torch.float64)


def blocks_of_rows(group: TensorGroup, length: int | None = None) -> Iterator[Rows]:
    """All rows in order; ``length`` elements each if given."""
    length = length or length_of_rows(group)
    size = max(BLOCK_ELEMENTS // max(length, 1), 1) * length
    for start in range(0, group.size, size or 1):
        count = min(size, group.size - start)

        def rows(reader: Reader, start: int = start, count: int = count) -> torch.Tensor:
            return read(reader.span(start, count), group.device).view(-1, length)

        base = None if group.base is None else rows(group.base)
        yield Rows(start, torch.stack([rows(reader) for reader in group.models]), base)


class Result:
    """The merged tensor, filled row by row: float64 where a model is, else float32."""

    def __init__(self, group: TensorGroup) -> None:
        wide = any(reader.dtype == "float64" for reader in group.models)
        self._shape = group.shape
        self._flat = torch.zeros(
            group.size, dtype=torch.float64 if wide else torch.float32, device=group.device
        )

    def put(self, rows: Rows, values_RC: torch.Tensor) -> None:
        self._flat[rows.start : rows.start + values_RC.numel()] = values_RC.reshape(-1)

    def tensor(self) -> torch.Tensor:
        return self._flat.view(self._shape)


def per_model(values: Floats | Sequence[float], like_KRC: torch.Tensor) -> torch.Tensor:
    """[K, 1, 1] float64 beside ``like_KRC``."""
    return torch.tensor(np.asarray(values, np.float64), device=like_KRC.device).view(-1, 1, 1)


def agreeing(v_KRC: torch.Tensor) -> torch.Tensor:
    """[K, R, C] which elements have the sign of their sum over the models (+ for a sum of zero), as 0 or 1.

    Source: the election of TIES, arXiv:2306.01708.
    """
    sign_RC = torch.where(v_KRC.sum(0) >= 0, 1.0, -1.0)
    return (v_KRC.sign() == sign_RC).to(v_KRC.dtype)


def divided(total: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """``total / divisor``, with a divisor of zero as one."""
    return total / torch.where(divisor == 0, 1.0, divisor)


def arcs(t: float, a: torch.Tensor, b: torch.Tensor, products: torch.Tensor, no_plane: float) -> torch.Tensor:
    """Spherical interpolation of many pairs of vectors at once; a line where two span no plane.

    Args:
        t: 0 gives ``a``, 1 gives ``b``.
        a: vectors, of a shape that ``products[i]`` broadcasts to.
        b: as ``a``.
        products: [3, ...] the products <a, a>, <b, b>, <a, b> of each pair.
        no_plane: sine squared up to which two vectors span no plane.
    """
    lengths = (products[0] * products[1]).sqrt()
    cosine = torch.where(lengths > 0, products[2] / lengths, 1.0).clamp(-1, 1)
    straight = 1 - cosine**2 <= no_plane
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    weight_a = torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / torch.sin(angle))
    weight_b = torch.where(straight, t, torch.sin(t * angle) / torch.sin(angle))
    return weight_a * a + weight_b * b


def slerp_by_vectors(group: TensorGroup, t: float, *, along_first: bool, no_plane: float) -> torch.Tensor:
    """Interpolate two models vector by vector, of deltas around the base where there is one.

    A vector runs along the last dimension, or along the first one.
    """
    columns = along_first and len(group.shape) > 1
    length = prod(group.shape[1:]) if columns else length_of_rows(group)

    def products(rows: Rows) -> torch.Tensor:
        a, b = rows.delta_KRC
        return torch.stack([a * a, b * b, a * b]).sum(1 if columns else 2, keepdim=True)

    whole = sum(products(rows) for rows in blocks_of_rows(group, length)) if columns else None
    result = Result(group)
    for rows in blocks_of_rows(group, length):
        a, b = rows.delta_KRC
        mixed = arcs(t, a, b, products(rows) if whole is None else torch.as_tensor(whole), no_plane)
        result.put(rows, mixed if rows.base_RC is None else rows.base_RC + mixed)
    return result.tensor()
