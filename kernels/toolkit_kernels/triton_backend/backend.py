"""The contract of backend.Backend on a CUDA device."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from toolkit_kernels.rules import BLOCK, Floats, Inputs, Piece, Pieces
from toolkit_kernels.spans import Span
from toolkit_kernels.triton_backend.elementwise import apply_kernel
from toolkit_kernels.triton_backend.launch import (
    device_of,
    is_aligned,
    launch,
    prepare,
    rows_of_inputs,
    upload,
)
from toolkit_kernels.triton_backend.reductions import (
    add_squares_kernel,
    gram_kernel,
    histogram_kernel,
    non_finite_kernel,
)

# With TRITON_INTERPRET=1 kernels run in Python, on memory of the CPU.
INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)

PASS_BLOCK = 2048  # elements of a program in passes over one tensor
GRAM_ROWS = 4  # blocks of a program in gram
NUM_COPIES = 8  # histograms among which programs take turns
COMPARED = 1 << 24  # elements whose magnitudes are compared at once: temporaries of 8 bytes each


class TritonBackend:
    """Every method computes on the device of its spans, in the current stream of the calling thread."""

    name = "triton"

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the interpreter runs one kernel at a time

    def apply(self, pieces: Pieces) -> NDArray[np.int64]:
        with self._device(span for piece in pieces for span in spans_of_piece(piece)) as device:
            counts = torch.zeros(len(pieces), dtype=torch.int64, device=device)
            launches = prepare(pieces, device)
            with self._lock:
                for prepared in launches:
                    prepared.run(counts)
            return counts.cpu().numpy()

    def gram(self, inputs: Inputs) -> Floats:
        num_models = len(inputs.theta)
        num_blocks = -(-inputs.size // BLOCK)
        result = np.zeros((num_models, num_models))
        if not num_blocks:
            return result
        with self._device(spans_of(inputs)) as device:
            rows, aligned = row_on(device, inputs)
            left, right = np.triu_indices(num_models)
            sums = torch.empty(len(left), num_blocks, dtype=torch.float64, device=device)
            # Launches 1D grid where each program processes GRAM_ROWS blocks of every model.
            num_programs = -(-num_blocks // GRAM_ROWS)
            shape = num_models, num_blocks
            self._launch(gram_kernel, num_programs, rows, sums, *shape, base_of(inputs), aligned, GRAM_ROWS)
            while sums.shape[1] > 1:
                if sums.shape[1] % 2:
                    sums = torch.nn.functional.pad(sums, (0, 1))
                sums = sums[:, 0::2] + sums[:, 1::2]
            result[left, right] = result[right, left] = sums[:, 0].cpu().numpy()
        return result

    def histogram(self, inputs: Inputs, prefixes: Sequence[int] | None) -> NDArray[np.int64]:
        num_models = len(inputs.theta)
        num_bins = 1 << 15 if prefixes is None else 1 << 16
        with self._device(spans_of(inputs)) as device:
            rows, aligned = row_on(device, inputs)
            counts = torch.zeros(num_models, NUM_COPIES, num_bins, dtype=torch.int64, device=device)
            chosen = torch.tensor(prefixes or [0] * num_models, dtype=torch.int32, device=device)
            models = chosen, num_models, base_of(inputs)
            self._pass(
                histogram_kernel, inputs, rows, counts, *models, prefixes is not None, NUM_COPIES, aligned
            )
            return counts.sum(1).cpu().numpy()

    def sift(
        self, inputs: Inputs, bounds: Sequence[tuple[int, int]], room: int
    ) -> tuple[NDArray[np.int64], list[NDArray[np.uint32]]]:
        counts = np.zeros((len(bounds), 4), np.int64)
        found = []
        with self._device(spans_of(inputs)):
            for k, (low, high) in enumerate(bounds):
                parts = [torch.empty(0, dtype=torch.int32)]
                for _, bits in magnitudes(inputs, k):
                    masks = (bits > high, bits >= high, bits > low, bits >= low)
                    counts[k] += [int(torch.count_nonzero(mask)) for mask in masks]
                    parts.append(bits[(bits > low) & (bits < high)].cpu())
                found.append(torch.cat(parts)[:room].numpy().view(np.uint32))
        return counts, found

    def nth_equal(self, inputs: Inputs, model: int, bits: int, number: int) -> tuple[int, int]:
        many = 0
        with self._device(spans_of(inputs)):
            for start, patterns in magnitudes(inputs, model):
                places = (patterns == bits).nonzero().flatten()
                if many + len(places) >= number:
                    return number, start + int(places[number - many - 1])
                many += len(places)
        return many, -1

    def non_finite(self, inputs: Inputs) -> NDArray[np.int64]:
        spans = spans_of(inputs)
        with self._device(spans) as device:
            rows, aligned = row_on(device, inputs)
            counts = torch.zeros(len(spans), dtype=torch.int64, device=device)
            self._pass(non_finite_kernel, inputs, rows, counts, len(inputs.theta), base_of(inputs), aligned)
            return counts.cpu().numpy()

    def add_squares(self, total: Span, values: Span, scale: float = 1.0) -> None:
        with self._device([total, values]):
            addresses = total.address, values.address
            scale_bits = int(np.float64(scale).view(np.int64))
            aligned = not any(address % 16 for address in addresses)
            arguments = (*addresses, values.size, scale_bits, values.dtype, aligned, PASS_BLOCK)
            # Launches 1D grid where each program processes PASS_BLOCK elements.
            self._launch(add_squares_kernel, -(-values.size // PASS_BLOCK), *arguments)

    def _pass(self, kernel: Any, inputs: Inputs, *arguments: object) -> None:
        # Launches 1D grid where each program processes PASS_BLOCK elements of every model.
        self._launch(kernel, -(-inputs.size // PASS_BLOCK), *arguments, PASS_BLOCK)

    def _launch(self, kernel: Any, num_programs: int, *arguments: object) -> None:
        if num_programs:
            with self._lock:
                launch(kernel, num_programs, *arguments)

    @contextlib.contextmanager
    def _device(self, spans: Iterable[Span]) -> Iterator[torch.device]:
        """Launches in here go to the device of the spans."""
        device = device_of(spans)
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield device
        elif INTERPRETED:
            yield device
        else:
            raise ValueError(
                "the triton backend computes on CUDA devices; these inputs lie in the memory of the CPU"
            )


def spans_of(inputs: Inputs) -> list[Span]:
    """Everything that is read, in the order of Backend.non_finite."""
    return [*inputs.theta, *([] if inputs.base is None else [inputs.base])]


def spans_of_piece(piece: Piece) -> list[Span]:
    return [piece.out, *spans_of(piece.inputs), *piece.inputs.fisher]


def magnitudes(inputs: Inputs, model: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Indices of first elements, and from there on the bit patterns of COMPARED magnitudes of delta_k, int32."""
    for start in range(0, inputs.size, COMPARED):
        delta = as_tensor(inputs.theta[model].part(start, COMPARED)).to(torch.float64, copy=True)
        if inputs.base is not None:
            delta -= as_tensor(inputs.base.part(start, COMPARED))
        yield start, delta.abs_().float().view(torch.int32)


def base_of(inputs: Inputs) -> str | None:
    return None if inputs.base is None else inputs.base.dtype


def row_on(device: torch.device, inputs: Inputs) -> tuple[torch.Tensor, bool]:
    """The row of one tensor, and whether all of its addresses are multiples of 16."""
    rows = rows_of_inputs([inputs])
    return upload(rows, device), bool(is_aligned(rows)[0])


def as_tensor(span: Span) -> torch.Tensor:
    if isinstance(span.data, np.ndarray):
        tensor = torch.from_numpy(span.data.copy())  # mapped files are read-only
        return tensor.view(torch.bfloat16) if span.dtype == "bfloat16" else tensor
    return span.data
