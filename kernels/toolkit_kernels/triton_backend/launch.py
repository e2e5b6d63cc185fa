"""Host side of the elementwise kernel: pieces become rows, chunks and as few launches as their dtypes allow.

Beside its kernel, a merge of hundreds of tensors costs what Python does before it: the loops here look at each span
once and leave the rest to numpy.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit_kernels.rules import (
    NOTHING,
    Consensus,
    FisherMean,
    Inputs,
    Keep,
    Piece,
    Threshold,
    WeightedSum,
)
from toolkit_kernels.spans import Span
from toolkit_kernels.triton_backend.elementwise import apply_kernel
from toolkit_kernels.triton_backend.rows import HEAD, MODEL, UNROLLED, Variant

# Elements of a program: 16 a thread where a thread keeps one sum for each of them, 8 where it keeps several.
BLOCKS = {"WeightedSum": 2048, "FisherMean": 1024, "Consensus": 1024, "NearSwap": 1024}
# A product and a sum stay two operations, each rounded, as on a CPU.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

EVERYTHING = Threshold(-1, -1)  # the set of all elements
ALL_WORDS = 1 << 32  # every random word is below


@dataclass(frozen=True)
class Launch:
    """A kernel and its tables on the device; runs any number of times while the memory of its pieces lives."""

    variant: Variant
    rows: torch.Tensor
    chunks: torch.Tensor

    def run(self, counts: torch.Tensor) -> None:
        """Compute, and add the numbers of results that are not finite to ``counts``, int64 [pieces]."""
        # Launches 1D grid where each program computes one block of one tensor.
        launch(apply_kernel, len(self.chunks), self.rows, self.chunks, counts, self.variant)


def launch(kernel: Any, num_programs: int, *arguments: object) -> None:
    """Queue a kernel in the current stream."""
    kernel[(num_programs,)](*arguments, **OPTIONS)


def prepare(pieces: Sequence[Piece], device: torch.device) -> list[Launch]:
    """The launches for ``pieces``, all on ``device``: one for each combination of rule, dtypes and alignment."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, piece in enumerate(pieces):
        groups[traits(piece)].append(index)
    launches = []
    for group_traits, indices in groups.items():
        variant = Variant(*group_traits)
        rows = rows_of_pieces([pieces[i] for i in indices], variant)
        rows["piece"] = indices
        aligned = is_aligned(rows)
        for wanted in (True, False):
            chosen = rows[(aligned == wanted) & (rows["size"] > 0)]
            if len(chosen):
                block = BLOCKS[variant.rule]
                chunks = chunk_table(tuple(chosen["size"].tolist()), block, device)
                launches.append(
                    Launch(replace(variant, aligned=wanted, block=block), upload(chosen, device), chunks)
                )
    return launches


def traits(piece: Piece) -> tuple[Any, ...]:
    """The first arguments of Variant that ``piece`` asks for."""
    rule, inputs = piece.rule, piece.inputs
    num_models = len(inputs.theta)
    unrolled = num_models <= UNROLLED
    theta = tuple([span.dtype for span in inputs.theta]) if unrolled else ()
    fisher: tuple[str, ...] = ()
    base = inputs.base.dtype if inputs.base else None
    flags = (False, False, False, False)
    if isinstance(rule, WeightedSum):
        base = base if rule.base_weight is not None else None
        needs_base = rule.base_weight is not None
    elif isinstance(rule, FisherMean):
        base, needs_base = None, False
        fisher = tuple([span.dtype for span in inputs.fisher]) if unrolled else ()
    else:
        needs_base = True
        if isinstance(rule, Consensus):
            trimmed = any(keep.among is not None or keep.outside is not None for keep in rule.keep)
            random = any(keep.probability is not None for keep in rule.keep)
            flags = (rule.elect, rule.normalize, trimmed, random)
    if needs_base and base is None:
        raise ValueError("this rule needs a base")
    return (type(rule).__name__, piece.out.dtype, base, theta, fisher, num_models, unrolled, *flags)


@functools.cache
def row_type(num_models: int) -> np.dtype:
    return np.dtype([*HEAD.descr, ("models", MODEL, (num_models,))])


def rows_of_inputs(inputs: Sequence[Inputs], unrolled: bool = False) -> NDArray[Any]:
    """Rows with the addresses, sizes and (not for unrolled loops) dtypes of what is read; all of as many models."""
    rows = np.zeros(len(inputs), row_type(len(inputs[0].theta)))
    rows["size"] = [x.theta[0].size for x in inputs]
    rows["start"] = [x.start for x in inputs]
    rows["base"] = [x.base.address if x.base else 0 for x in inputs]
    for name in ("theta", "fisher"):
        spans = [getattr(x, name) for x in inputs]
        if spans[0]:
            rows["models"][name] = [[span.address for span in of_tensor] for of_tensor in spans]
            if not unrolled:
                rows["models"][f"{name}_code"] = [[span.code for span in of_tensor] for of_tensor in spans]
    return rows


def rows_of_pieces(pieces: Sequence[Piece], variant: Variant) -> NDArray[Any]:
    """Complete rows but for the number of the piece."""
    rows = rows_of_inputs([piece.inputs for piece in pieces], variant.unrolled)
    rows["out"] = [piece.out.address for piece in pieces]
    rules: Any = [piece.rule for piece in pieces]
    models = rows["models"]
    if variant.rule == "NearSwap":
        rows["scalar"] = [rule.t for rule in rules]
        return rows
    models["weight"] = [rule.weights for rule in rules]
    if variant.rule == "WeightedSum":
        rows["scalar"] = [rule.base_weight or 0.0 for rule in rules]
    elif variant.rule == "FisherMean":
        models["floor"] = [rule.floors for rule in rules]
        models["fallback"] = [rule.fallback for rule in rules]
    else:
        rows["scalar"] = [rule.scale for rule in rules]
        rows["negligible"] = [rule.negligible for rule in rules]
        models["rescale"] = [[keep.rescale for keep in rule.keep] for rule in rules]
        names = ["among", "among_last", "outside", "outside_last", "key", "stream", "limit"]
        keeps = np.array([[keep_columns(keep) for keep in rule.keep] for rule in rules], np.uint64).view(
            np.int64
        )
        for column, name in enumerate(names):
            models[name] = keeps[:, :, column]
    return rows


def keep_columns(keep: Keep) -> tuple[int, ...]:
    """The columns of rows.MODEL from among to limit, as unsigned integers."""
    among = EVERYTHING if keep.among is None else keep.among
    outside = NOTHING if keep.outside is None else keep.outside
    limit = ALL_WORDS if keep.probability is None else int(keep.probability * ALL_WORDS)
    key = keep.key[0] | keep.key[1] << 32
    columns = (among.bits, among.last, outside.bits, outside.last, key, keep.stream, limit)
    return tuple([column % 2**64 for column in columns])


def is_aligned(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """[T] whether all addresses of a row are multiples of 16; an address that is not used is zero."""
    models = rows["models"]
    low_bits = rows["out"] | rows["base"]
    low_bits = low_bits | np.bitwise_or.reduce(models["theta"] | models["fisher"], axis=1)
    return low_bits % 16 == 0


@functools.lru_cache(maxsize=32)
def chunk_table(sizes: tuple[int, ...], block: int, device: torch.device) -> torch.Tensor:
    """[programs, 2] int32: for each block of each tensor the number of the tensor and its own within the tensor."""
    num_blocks = -(-np.array(sizes) // block)
    tensors = np.repeat(np.arange(len(sizes)), num_blocks)
    firsts = np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    table = np.stack([tensors, np.arange(len(tensors)) - firsts], axis=1)
    return torch.from_numpy(table.astype(np.int32)).to(device)


def upload(rows: NDArray[Any], device: torch.device) -> torch.Tensor:
    """[T, columns] int64 on the device."""
    return torch.from_numpy(rows.view(np.int64).reshape(len(rows), -1)).to(device)


def device_of(spans: Iterable[Span]) -> torch.device:
    """The one device on which all of ``spans`` lie.

    Raises:
        ValueError: there are several.
    """
    found = {-1 if isinstance(span.data, np.ndarray) else span.data.get_device() for span in spans}
    if len(found) > 1:
        raise ValueError("the inputs and outputs of one call lie on different devices")
    index = found.pop() if found else -1
    return torch.device("cpu") if index < 0 else torch.device("cuda", index)
