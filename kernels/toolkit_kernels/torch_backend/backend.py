"""The contract of ``toolkit_kernels.backend`` in torch."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit_kernels.rules import Floats, Inputs, Piece, Pieces
from toolkit_kernels.spans import Span
from toolkit_kernels.torch_backend import elementwise, reductions
from toolkit_kernels.torch_backend.memory import chunk_size, chunks_of, scratch, tensor_of


class TorchBackend:
    """Runs where its spans lie: numpy and torch on a CPU, torch on any device. See the package's docstring."""

    name = "torch"

    @torch.inference_mode()
    def apply(self, pieces: Pieces) -> NDArray[np.int64]:
        return np.array([_apply(piece) for piece in pieces], dtype=np.int64)

    @torch.inference_mode()
    def gram(self, inputs: Inputs) -> Floats:
        return reductions.gram(inputs)

    @torch.inference_mode()
    def histogram(self, inputs: Inputs, prefixes: Sequence[int] | None) -> NDArray[np.int64]:
        return reductions.histogram(inputs, prefixes)

    @torch.inference_mode()
    def sift(
        self, inputs: Inputs, bounds: Sequence[tuple[int, int]], room: int
    ) -> tuple[NDArray[np.int64], list[NDArray[np.uint32]]]:
        return reductions.sift(inputs, bounds, room)

    @torch.inference_mode()
    def nth_equal(self, inputs: Inputs, model: int, bits: int, number: int) -> tuple[int, int]:
        return reductions.nth_equal(inputs, model, bits, number)

    @torch.inference_mode()
    def non_finite(self, inputs: Inputs) -> NDArray[np.int64]:
        spans = [*inputs.theta, *([] if inputs.base is None else [inputs.base])]
        return np.array([_non_finite(span) for span in spans], dtype=np.int64)

    @torch.inference_mode()
    def add_squares(self, total: Span, values: Span, scale: float = 1.0) -> None:
        target, source = tensor_of(total), tensor_of(values)
        size = chunk_size(2, source.device)
        for target_C, source_C in zip(target.split(size), source.split(size), strict=True):
            value_C, square_C = scratch.rows(2, len(source_C), source.device)
            torch.mul(value_C.copy_(source_C), scale, out=square_C).mul_(value_C)
            elementwise.store(value_C.copy_(target_C).add_(square_C), target_C)


def make() -> TorchBackend:
    return TorchBackend()


def _apply(piece: Piece) -> int:
    out = tensor_of(piece.out)
    num_rows = elementwise.num_rows(piece.rule, len(piece.inputs.theta))
    num_bad = torch.zeros((), dtype=torch.int64, device=out.device)
    for chunk in chunks_of(piece.inputs, num_rows):
        out_C = out[chunk.offset : chunk.offset + chunk.size]
        elementwise.store(elementwise.compute(piece.rule, chunk), out_C)
        num_bad.add_(reductions.count_non_finite(out_C))
    return int(num_bad)


def _non_finite(span: Span) -> int:
    values = tensor_of(span)
    parts = values.split(chunk_size(1, values.device))
    return int(sum(reductions.count_non_finite(part) for part in parts)) if len(values) else 0
