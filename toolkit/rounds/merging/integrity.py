"""Whether a merge is sound: what went in, that it stayed as it was, and what came out."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from math import fsum, isfinite

import numpy as np
import torch
from numpy.typing import NDArray

from toolkit.errors import InputError, MergeError, ModelError
from toolkit.merging.states import State
from toolkit.rounds.merging.combination import Combination, Part
from toolkit.rounds.merging.contribution import Contribution
from toolkit_kernels.pool import Pool

# How far a sum of weights may be from 1: rounding of weights that were read from a file with six digits.
WEIGHT_TOLERANCE = 1e-6
# Elements that are compared with the envelope at a time: they stay in the cache.
PIECE = 1 << 16
# Bytes that are hashed at a time.
PIECE_BYTES = 1 << 23


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises InputError where a weight is negative or not finite, or all are zero."""
    for participant, weight in weights.items():
        if not (isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of {participant} is {weight}; weights are finite and not negative")
    if not any(weights.values()):
        raise InputError(f"all weights are 0: {', '.join(weights)}")


def check_sum(weights: Mapping[str, float]) -> float:
    """The sum of the weights.

    Raises:
        MergeError: it is not 1.
    """
    total = fsum(weights.values())
    if abs(total - 1.0) > WEIGHT_TOLERANCE:
        text = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        raise MergeError(f"the weights add up to {total:.9g}, not to 1: {text}")
    return total


def check_alike(states: Mapping[str, State]) -> None:
    """Raises ModelError unless all states have the same names, shapes and dtypes."""
    if not states:
        return
    (first, reference), *others = states.items()
    for participant, state in others:
        missing, extra = sorted(reference.keys() - state.keys()), sorted(state.keys() - reference.keys())
        if missing or extra:
            what = f"lacks {missing[0]}" if missing else f"has {extra[0]} too"
            raise ModelError(f"the state of {participant} is not like that of {first}: it {what}")
        for name, tensor in reference.items():
            other = state[name]
            if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                raise ModelError(
                    f"{name}: {other.dtype} {tuple(other.shape)} in the state of {participant}, "
                    f"{tensor.dtype} {tuple(tensor.shape)} in that of {first}"
                )


def check_fishers(contributions: Sequence[Contribution]) -> None:
    """Raises ModelError where a Fisher has a tensor that its state lacks, or another shape."""
    for entry in contributions:
        for name, tensor in (entry.fisher or {}).items():
            if name not in entry.state or entry.state[name].shape != tensor.shape:
                raise ModelError(
                    f"{name}: the Fisher of {entry.participant} has it with shape {tuple(tensor.shape)}, and its state "
                    "has not"
                )


def check_result(state: State, like: State) -> None:
    """Raises MergeError unless ``state`` has the names, shapes and dtypes of ``like``, and finite values."""
    if list(state) != list(like):
        raise MergeError("the merged state has other tensors than the participants")
    for name, tensor in like.items():
        merged = state[name]
        if (merged.shape, merged.dtype) != (tensor.shape, tensor.dtype):
            raise MergeError(f"{name}: merged into {merged.dtype} {tuple(merged.shape)}, from another one")
        if merged.is_floating_point() and not bool(merged.isfinite().all()):
            raise MergeError(f"{name}: the merged tensor holds NaN or infinity")


def check_envelope(state: State, among: Sequence[State], names: Sequence[str]) -> None:
    """Whether each element lies between the smallest and the largest of its inputs.

    Without tolerance in float32 and below: a mean that was formed in float64 and rounded once cannot leave the range of
    numbers of that type. In float64 it may, by its own rounding.

    Raises:
        MergeError: an element does not; the message names the tensor.
    """
    pieces = [(name, start) for name in names for start in range(0, state[name].numel(), PIECE)]

    def num_outside(piece: tuple[str, int]) -> int:
        name, start = piece
        merged, *inputs = (each[name].detach().reshape(-1)[start : start + PIECE] for each in (state, *among))
        low, high = inputs[0].clone(), inputs[0].clone()
        for values in inputs[1:]:
            torch.minimum(low, values, out=low)
            torch.maximum(high, values, out=high)
        if merged.dtype == torch.float64:
            slack = 4 * torch.finfo(torch.float64).eps * torch.maximum(low.abs(), high.abs())
            low, high = low - slack, high + slack
        return int(((merged < low) | (merged > high)).sum())

    with Pool() as pool:
        for (name, _), outside in zip(pieces, pool.map(num_outside, pieces), strict=True):
            if outside:
                raise MergeError(
                    f"{name}: {outside} merged values lie outside of what the participants hold; the memory or the "
                    "merge kernel is broken"
                )


def check_part(combination: Combination, part: Part, merged: State) -> None:
    """All that can be said of merged tensors by themselves, whether they are a whole state or a bucket of it.

    Raises:
        MergeError: names, shapes, dtypes, values that are not finite, or outside of the envelope of a mean.
    """
    check_result(merged, part.states[0])
    names = combination.convex_names(merged) if len(part.states) > 1 else list(merged)
    check_envelope(merged, part.states, names)


def check_unchanged(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raises MergeError where a state has another checksum than before."""
    changed = [participant for participant, checksum in before.items() if after[participant] != checksum]
    if changed:
        raise MergeError(f"the state of {', '.join(changed)} changed while it was merged")


def checksum_of(state: State) -> int:
    """The sum of the state's bits in words of 8 bytes, modulo 2**64: several times as fast as SHA-256, and enough to
    see that something has written into a state."""
    with Pool() as pool:
        return sum(pool.map(_sum_of_words, _pieces(state))) % 2**64


def sha256_of(state: State) -> str:
    """SHA-256 over names, types and shapes, and over the SHA-256 of each piece of the tensors' bytes; on all cores."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    with Pool() as pool:
        for digest in pool.map(lambda piece: hashlib.sha256(piece.data).digest(), _pieces(state)):
            total.update(digest)
    return total.hexdigest()


def _pieces(state: State) -> list[NDArray[np.uint8]]:
    """The bytes of all tensors, a few megabytes at a time."""
    whole = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for t in state.values())
    return [bits[start : start + PIECE_BYTES] for bits in whole for start in range(0, len(bits), PIECE_BYTES)]


def _sum_of_words(bits: NDArray[np.uint8]) -> int:
    words = len(bits) // 8 * 8
    return int(bits[:words].view(np.uint64).sum()) + int.from_bytes(bits[words:].tobytes(), "little")


def with_names(message: str, participants: Sequence[str]) -> str:
    """A message of the merge engine, which counts states, with the participants' names."""

    def name(match: re.Match[str]) -> str:
        number = int(match[2])
        return f"{match[1]} of {participants[number]}" if number < len(participants) else match[0]

    return re.sub(r"\b(state|Fisher) (\d+)\b", name, message)
