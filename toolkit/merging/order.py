"""The order in which the models of a group are added up: by weight and content, never by the order they were named in.

A float64 sum depends on the order of its terms in the last bit. That bit decides where the exact result lies half-way
between two numbers of the output, and with weights such as 0.4 and 0.3 that is no rare case. With an order of their
own, the models can be given in any order and the result has the same bits, random masks included.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.merging.group import Reader, TensorGroup
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
        order = canonical_order(group.models, arguments.get("weight"))
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


def canonical_order(models: Sequence[Reader], weights: Sequence[float] | np.ndarray | None) -> list[int]:
    """Falling weights; where they are equal by content, looked at only then. Equal tensors keep their places."""
    places = list(range(len(models)))
    ranks: list[tuple[Any, ...]] = [(0.0 if weights is None else -float(weights[k]),) for k in places]
    for fingerprint in (_sample, _whole):
        ranks = _refined(ranks, models, fingerprint)
    return sorted(places, key=lambda k: (ranks[k], k))


def _refined(
    ranks: list[tuple[Any, ...]], models: Sequence[Reader], fingerprint: Callable[[Reader], bytes]
) -> list[tuple[Any, ...]]:
    """Ranks with a fingerprint added to those that occur more than once."""
    return [
        (*rank, fingerprint(model)) if ranks.count(rank) > 1 else rank
        for rank, model in zip(ranks, models, strict=True)
    ]


def _sample(model: Reader) -> bytes:
    size = int(np.prod(model.shape, dtype=np.int64))
    if size <= NUM_STRETCHES * STRETCH:
        return bytes(_bytes(model.span(0, size))) if size else b""
    starts = [(size - STRETCH) * number // (NUM_STRETCHES - 1) for number in range(NUM_STRETCHES)]
    return b"".join(_bytes(model.span(start, STRETCH)) for start in starts)


def _whole(model: Reader) -> bytes:
    size = int(np.prod(model.shape, dtype=np.int64))
    return hashlib.blake2b(_bytes(model.span(0, size)), digest_size=16).digest() if size else b""


def _bytes(span: Span) -> memoryview:
    values = span.data
    if not isinstance(values, np.ndarray):
        import torch

        values = values.view(torch.uint8).cpu().numpy()
    return values.data.cast("B")
