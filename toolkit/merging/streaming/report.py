"""merge_report.json: what went into a merge, what was done, what came out."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit.merging.plan import MergePlan
from toolkit.merging.streaming.compute import Findings
from toolkit.merging.streaming.input_digests import Digest
from toolkit.merging.streaming.progress_file import plain, version_of
from toolkit_kernels.rules import FisherMean

REPORT_NAME = "merge_report.json"


@dataclass(slots=True)
class Seconds:
    """Wall time of the parts of a merge. Inputs are hashed beside everything else: ``hashing`` is from the beginning to
    the last digest, and no part of the sum."""

    planning: float = 0.0
    merging: float = 0.0
    hashing: float = 0.0
    syncing: float = 0.0
    verifying: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Verified:
    """What --verify found.

    Attributes:
        num_tensors: recomputed.
        num_elements: recomputed.
        backend: that recomputed them.
        num_different: elements whose bits differ, by one unit in the last place at most.
        num_bytes_compared: with the checksums of what was computed; a resumed merge has those of its own part.
        sha256: of each weights file, read from the disk.
    """

    num_tensors: int
    num_elements: int
    backend: str
    num_different: int
    num_bytes_compared: int
    sha256: dict[str, str]


@dataclass(slots=True)
class Report:
    """A finished merge.

    Attributes:
        out: the folder.
        method: name of the method.
        seed: of random masks.
        settings: the recipe.
        inputs: label, role and files of each model: path, bytes, SHA-256 where it was asked for, and whether that was
            computed or remembered from an earlier merge of the unchanged file.
        outputs: weights files (name, bytes, SHA-256 where they were verified).
        groups: tensors that share method and parameters: how many, one of them, the effective weights of the models.
        non_finite: NaN and infinite elements in inputs, by file.
        bytes_read: of all inputs.
        bytes_written: of all tensors.
        gigabytes_per_second: read and written while merging, over the time that took.
        seconds: by part.
        backend: that computed.
        device: of methods that need whole tensors.
        num_threads: that worked.
        resumed: whether a killed merge was finished.
        verified: with --verify.
        notes: for the user.
        versions: of what computed.
        finished: date and time.
    """

    out: Path
    method: str
    seed: int
    settings: Mapping[str, Any]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    non_finite: dict[str, int]
    bytes_read: int
    bytes_written: int
    gigabytes_per_second: float
    seconds: Seconds
    backend: str
    device: str
    num_threads: int
    resumed: bool
    verified: Verified | None
    notes: list[str]
    versions: dict[str, str] = field(default_factory=lambda: versions())
    finished: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def as_json(self) -> str:
        """The text of merge_report.json."""
        values = asdict(self)
        del values["out"]
        values["settings"] = plain(self.settings)
        values["seconds"] = {name: round(value, 4) for name, value in asdict(self.seconds).items()}
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def versions() -> dict[str, str]:
    """Of everything that computes, torch only where it was loaded."""
    names = ["meldkit", "numpy", *(name for name in ("numba", "torch", "triton") if name in sys.modules)]
    return {"python": platform.python_version()} | {name: version_of(name) or "?" for name in names}


def input_facts(plan: MergePlan, digests: Mapping[Path, Digest]) -> list[dict[str, Any]]:
    """Models with their files; of a file that was hashed the SHA-256, and whether it was computed or remembered."""

    def facts(path: Path) -> dict[str, Any]:
        known: dict[str, Any] = {"path": str(path), "num_bytes": path.stat().st_size, "sha256": None}
        if path in digests:
            how = "remembered" if digests[path].is_remembered else "computed"
            known |= {"sha256": digests[path].sha256, "sha256_was": how}
        return known

    return [
        {"label": model.label, "role": model.role, "files": [facts(path) for path in model.files]}
        for model in plan.inputs
    ]


def group_facts(groups: Mapping[str, Mapping[str, Any]], findings: Findings) -> list[dict[str, Any]]:
    """Groups of tensors with the weights that their rules had: one list, or the lowest and the highest.

    No weights where a method gave tensors; the rule is then the method's name.
    """
    result = []
    for name, facts in groups.items():
        rule, lowest, highest = findings.weights.get(name, (None, [], []))
        weights: Sequence[float] | dict[str, list[float]] = lowest
        if lowest != highest:
            weights = {"lowest": lowest, "highest": highest}
        result.append({**facts, "rule": rule, "effective_weights": plain(weights)})
        if rule == FisherMean.__name__:
            result[-1]["effective_weights_are"] = "factors of the Fishers' elements, normalisation included"
    return result
