"""The order in which the models of a group are added up: by what they are, never by the order they were named in.

A float64 sum depends on the order of its terms in the last bit. That bit decides where the exact result lies half-way
between two numbers of the output, and with weights such as 0.4 and 0.3 that is no rare case. With an order of their
own, the models can be given in any order and the result has the same bits, random masks included.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.merging.group import PIECE_SIZE, FisherTensor, Reader, TensorGroup
from toolkit.merging.registry import MergeMethod
from toolkit_kernels.rules import Rule
from toolkit_kernels.spans import Span

if TYPE_CHECKING:
    import torch

# Elements that are looked at before whole tensors are: this many stretches of this length, spread over the tensor.
NUM_STRETCHES, STRETCH = 8, 64


def call_method(
    method: MergeMethod, group: TensorGroup, arguments: Mapping[str, Any]
) -> "tuple[Rule | torch.Tensor, TensorGroup, list[int]]":
    """Call a method's function with the models in canonical order.

    Returns:
        What the function returned; the group in the order that this is for; and that order, as places in ``group``.
    """
    order = list(range(group.num_models))
    if group.num_models > 1 and not method.ordered:
        order = canonical_order(group, method, arguments)
        if order != list(range(group.num_models)):
            group, arguments = reordered(group, method, arguments, order)
    return method.function(group, **arguments), group, order


def reordered(
    group: TensorGroup, method: MergeMethod, arguments: Mapping[str, Any], order: Sequence[int]
) -> tuple[TensorGroup, dict[str, Any]]:
    """The group and the per-model arguments with model ``order[0]`` first, then ``order[1]``, ..."""
    per_model = {parameter.argument for parameter in method.parameters if parameter.per_model}
    arguments = {
        name: _taken(value, order) if name in per_model else value for name, value in arguments.items()
    }
    group = replace(
        group, models=_taken(group.models, order), fisher=_taken(group.fisher, order) if group.fisher else ()
    )
    return group, arguments


def _taken(values: Any, order: Sequence[int]) -> Any:
    if isinstance(values, np.ndarray):
        return values[list(order)]
    return type(values)(values[k] for k in order)


def canonical_order(group: TensorGroup, method: MergeMethod, arguments: Mapping[str, Any]) -> list[int]:
    """Falling weights, then the other numbers of each model, then content, read no further than needed to tell them
    apart. Models that are alike in everything keep their places."""
    groups = [list(range(group.num_models))]
    for key in _keys(group, method, arguments):
        groups = [part for places in groups for part in _parted(places, key)]
        if len(groups) == group.num_models:
            break
    return [place for places in groups for place in places]


Key = Callable[[int], Any]


def _parted(places: list[int], key: Key) -> list[list[int]]:
    """The places in groups of equal keys, by rising keys."""
    if len(places) == 1:
        return [places]
    keyed = sorted(((key(place), place) for place in places), key=itemgetter(0))
    return [[place for _, place in equal] for _, equal in groupby(keyed, key=itemgetter(0))]


def _keys(group: TensorGroup, method: MergeMethod, arguments: Mapping[str, Any]) -> Iterator[Key]:
    """What may tell two models apart, the cheap first."""
    named = [parameter.argument for parameter in method.parameters if parameter.per_model]
    per_model = {name: arguments[name] for name in named if name in arguments}
    numbers = [values for values in per_model.values() if isinstance(values, np.ndarray)]
    if "weight" in per_model:
        yield lambda k: -float(per_model["weight"][k])
    yield lambda k: [float(values[k]) for values in numbers]
    yield lambda k: [_measure(entry) for entry in group.fisher[k : k + 1]]
    contents: list[Sequence[Reader | None]] = [group.models]
    if group.fisher:
        contents.append([None if entry is None else entry.reader for entry in group.fisher])
    for readers in contents:
        yield partial(_sample, readers, group.size)
    for readers in contents:
        for start in range(0, group.size, PIECE_SIZE) if group.size > NUM_STRETCHES * STRETCH else ():
            yield partial(_piece, readers, start, min(PIECE_SIZE, group.size - start))
    for values in per_model.values():
        if not isinstance(values, np.ndarray):
            yield partial(_other, values, group.name)


def _measure(entry: FisherTensor | None) -> tuple[float, ...]:
    return () if entry is None else (entry.norm, entry.mean, entry.model_norm)


def _sample(readers: Sequence[Reader | None], size: int, k: int) -> bytes:
    if size <= NUM_STRETCHES * STRETCH:
        return _piece(readers, 0, size, k)
    starts = [(size - STRETCH) * number // (NUM_STRETCHES - 1) for number in range(NUM_STRETCHES)]
    return b"".join(_piece(readers, start, STRETCH, k) for start in starts)


def _piece(readers: Sequence[Reader | None], start: int, size: int, k: int) -> bytes:
    reader = readers[k]
    return _bytes(reader.span(start, size)) if reader is not None and size else b""


def _other(values: Sequence[Any], name: str, k: int) -> tuple[str, bytes]:
    """A text, a path, or tensors by name (RegMean's products of inputs): of those, the one of this tensor."""
    tensors = getattr(values[k], "tensors", None)
    if tensors is None:
        return str(values[k]), b""
    tensor = tensors.get(name)
    return "", b"" if tensor is None else _bytes(Span.of(tensor.contiguous()))


def _bytes(span: Span) -> bytes:
    values = span.data
    if not isinstance(values, np.ndarray):
        import torch

        values = values.view(torch.uint8).cpu().numpy()
    return values.tobytes()
