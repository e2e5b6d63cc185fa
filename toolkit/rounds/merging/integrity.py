"""Whether a merge is sound: what went in, that it stayed as it was, and what came out."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from math import fsum, isfinite

import torch
from torch import Tensor

from toolkit.errors import InputError, MergeError, ModelError
from toolkit.merging.states import State
from toolkit.rounds.merging.combination import Combination, Part
from toolkit.rounds.merging.contribution import Contribution
from toolkit_kernels.pool import Pool

# How far a sum of weights may be from 1: rounding of weights that were read from a file with six digits.
WEIGHT_TOLERANCE = 1e-6
# Elements that are compared with the envelope at a time: of a dozen states they stay in the cache.
CHUNK = 1 << 16


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
    for name in names:
        flat = [each[name].reshape(-1) for each in (state, *among)]
        for merged, *inputs in zip(*(tensor.split(CHUNK) for tensor in flat), strict=True):
            stack = torch.stack(inputs)
            low, high = stack.amin(0), stack.amax(0)
            slack = 0.0
            if merged.dtype == torch.float64:
                slack = 4 * torch.finfo(torch.float64).eps * torch.maximum(low.abs(), high.abs())
            outside = int(((merged < low - slack) | (merged > high + slack)).sum())
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


def check_unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raises MergeError where a state has another SHA-256 than before."""
    changed = [participant for participant, digest in before.items() if after[participant] != digest]
    if changed:
        raise MergeError(f"the state of {', '.join(changed)} changed while it was merged")


def sha256_of(state: State) -> str:
    """SHA-256 over names, types, shapes and the SHA-256 of each tensor's bytes; on all cores."""
    with Pool() as pool:
        digests = pool.map(_tensor_sha256, list(state.values()))
    total = hashlib.sha256()
    for (name, tensor), digest in zip(state.items(), digests, strict=True):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + digest)
    return total.hexdigest()


def _tensor_sha256(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).digest()


def with_names(message: str, participants: Sequence[str]) -> str:
    """A message of the merge engine, which counts states, with the participants' names."""

    def name(match: re.Match[str]) -> str:
        number = int(match[2])
        return f"{match[1]} of {participants[number]}" if number < len(participants) else match[0]

    return re.sub(r"\b(state|Fisher) (\d+)\b", name, message)
