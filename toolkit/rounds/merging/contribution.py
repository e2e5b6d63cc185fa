"""What a participant brings to a merge, and what comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One participant's part of a merge.

    Attributes:
        participant: its name.
        state: the trained tensors (``ParticipantTrainer.state()``); nothing changes them while the merge runs.
        weight: its share, 0 or more; the shares of a merge add up to 1.
        fisher: diagonal Fisher information or Adam's second moments, >= 0, under names of ``state``; for methods that
            weigh by it.
    """

    participant: str
    state: Mapping[str, Tensor]
    weight: float
    fisher: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOutcome:
    """A merge that succeeded.

    Attributes:
        state: the merged tensors, under the names and in the dtypes of the first contribution.
        weights: as they were given, of every contribution.
        method: the merge method, with the way of merging adapters where it is one.
        seconds: wall-clock time of the merge and its checks.
        attempts: how many it took.
        input_sha256: of each contribution's state; empty without ``--validate-merge-integrity``.
        output_sha256: of the merged state; empty likewise.
        integrity: what was checked, and what came out.
        notes: what the user should know.
    """

    state: dict[str, Tensor]
    weights: dict[str, float]
    method: str
    seconds: float
    attempts: int
    input_sha256: dict[str, str]
    output_sha256: str
    integrity: dict[str, Any]
    notes: list[str] = field(default_factory=list)
