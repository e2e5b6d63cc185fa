"""State dicts that go into a merge and come out of it: what they must have in common, and which names share memory."""

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from toolkit.errors import InputError, ModelError
from toolkit_kernels.spans import CODES

State = Mapping[str, torch.Tensor]
Named = Mapping[str, State]
"""States by what messages call them."""


def one_device(states: Named) -> None:
    """Raises InputError where the tensors of these states lie on several devices."""
    seen: dict[str, str] = {}
    for who, state in states.items():
        for name, tensor in state.items():
            seen.setdefault(str(tensor.device), f"{name} of {who}")
    if len(seen) > 1:
        where = ", ".join(f"{example} on {device}" for device, example in seen.items())
        raise InputError(f"tensors of one merge lie on several devices: {where}", hint="move them to one")


def same_names(first: State, state: State, who: str) -> None:
    """Raises ModelError unless ``state`` has the names, shapes and (of integers) values of ``first``."""
    missing, extra = sorted(first.keys() - state.keys()), sorted(state.keys() - first.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]} too"
        raise ModelError(f"{who} {what}: {len(missing)} tensors missing, {len(extra)} foreign")
    for name, tensor in first.items():
        other = state[name]
        if other.shape != tensor.shape:
            raise ModelError(f"{name}: {who} has shape {tuple(other.shape)}, the first {tuple(tensor.shape)}")
        if other.is_floating_point() != tensor.is_floating_point():
            raise ModelError(f"{name}: {who} has {other.dtype}, the first {tensor.dtype}")
        if other.is_floating_point():
            known_dtype(other, name, who)
        elif other.dtype != tensor.dtype or not torch.equal(tensor, other):
            raise ModelError(
                f"{name}: {tensor.dtype} is not averaged, and {who} has other values than the first"
            )


def known_dtype(tensor: torch.Tensor, name: str, who: str) -> None:
    """Raises ModelError for floating-point types that are not merged, float8 for one."""
    if str(tensor.dtype).removeprefix("torch.") not in CODES:
        raise ModelError(
            f"{name}: {who} has {tensor.dtype}, and only {', '.join(CODES)} are merged",
            hint="convert it before: tensor.to(torch.bfloat16), times its scale where it has one",
        )


# --- the result


def outputs(
    first: State,
    out: dict[str, torch.Tensor] | None,
    out_dtype: torch.dtype | None,
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, torch.Tensor]:
    """Tensors for a result like ``first``: those of ``out`` after a check, or new ones. Integers are copied.

    Args:
        first: shapes, dtypes, and the values of integers.
        out: to receive the result; None for new ones.
        out_dtype: of floating-point tensors, if not that of ``first``.
        ties: groups of names; in new outputs the names of a group are one tensor.
    """
    if out_dtype is not None and str(out_dtype).removeprefix("torch.") not in CODES:
        raise InputError(f"out_dtype is {out_dtype}; results are of {', '.join(CODES)}")
    if out is None:
        result = {
            name: torch.empty_like(tensor, dtype=out_dtype, memory_format=torch.contiguous_format)
            if tensor.is_floating_point()
            else tensor.clone()
            for name, tensor in first.items()
        }
        return result | {name: result[names[0]] for names in ties for name in names}
    for name, tensor in first.items():
        target = out.get(name)
        dtype = out_dtype if out_dtype is not None and tensor.is_floating_point() else tensor.dtype
        if (
            target is None
            or target.shape != tensor.shape
            or target.dtype != dtype
            or not target.is_contiguous()
        ):
            raise InputError(
                f"out[{name!r}] must be a contiguous {dtype} tensor of shape {tuple(tensor.shape)}"
            )
    one_device({"the first state": first, "out": {name: out[name] for name in first}})
    return out


def copy_integers(first: State, result: State) -> None:
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            result[name].copy_(tensor)


# --- names that share memory


def tied(states: Iterable[State]) -> list[list[str]]:
    """The floating-point names of the first state in groups: those of one group are one tensor in every state."""
    states = list(states)
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            groups[tuple(_place(state[name], name) for state in states)].append(name)
    return list(groups.values())


def _place(tensor: torch.Tensor, name: str) -> Hashable:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name


def check_memory(out: State, groups: Sequence[Sequence[str]], inputs: Named) -> None:
    """Whether the result can be written to ``out``, tensor by tensor, while ``inputs`` are still read.

    Args:
        out: the outputs.
        groups: of their names, those of one tensor together.
        inputs: what is read; a state may lack names.

    Raises:
        InputError: outputs overlap; or they are one tensor and some input's are not, nor equal; or an output overlaps
            an input other than its own.
    """
    extents = sorted((*_extent(out[names[0]]), number) for number, names in enumerate(groups))
    extents = [extent for extent in extents if extent[0] < extent[1]]
    for (_, end, number), (start, _, other) in itertools.pairwise(extents):
        if start < end:
            raise InputError(f"out[{groups[number][0]!r}] and out[{groups[other][0]!r}] overlap in memory")
    starts = [start for start, _, _ in extents]
    for number, names in enumerate(groups):
        for who, state in inputs.items():
            present = [name for name in names if name in state]
            for name in present:
                _check_same(state, present[0], name, who)
                own = _extent(state[name])
                place = bisect_right(starts, own[1] - 1) - 1
                if own[0] < own[1] and place >= 0 and extents[place][1] > own[0]:
                    if extents[place] == (*own, number):
                        continue
                    written = groups[extents[place][2]][0]
                    raise InputError(f"out[{written!r}] overlaps {name} of {who}, which is another tensor")


def _check_same(state: State, first: str, name: str, who: str) -> None:
    a, b = state[first], state[name]
    if name != first and _place(a, "") != _place(b, "") and not torch.equal(a, b):
        raise InputError(
            f"out[{first!r}] and out[{name!r}] are one tensor, and in {who} they differ",
            hint="give each of them a tensor of its own",
        )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the one after the last."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
