"""Fisher information in memory and as a safetensors file.

The file: one float32 tensor for each estimated parameter, under the name that it has in the model's own safetensors
file. Its metadata (text): ``format``, ``n_examples``, ``kind``, ``task``, ``normalisation``, ``data_fingerprint``,
``global_norm``, and as JSON ``norms`` and ``means`` (by tensor) and ``slow_parameters``.
"""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from toolkit.durable import STAGING_PREFIX, sync
from toolkit.errors import ModelError
from toolkit.merging.fisher.likelihood import NORMALISATION
from toolkit.merging.fisher_files import norm_and_mean
from toolkit.merging.group import MemoryReader

FORMAT = "meldkit-fisher-1"


@dataclass(frozen=True, slots=True)
class Fisher:
    """Diagonal Fisher information of a model's parameters.

    Attributes:
        tensors: float32, by the tensor's name in the model's safetensors file: mean over examples of the squared
            gradient of the log-likelihood of one.
        num_examples: how many.
        kind: "empirical" (labels of the data) or "true" (labels of the model).
        task: "causal-lm" or "sequence-classification".
        data_fingerprint: SHA-256 of the examples, whatever their order.
        slow_parameters: tensors that needed one backward pass an example.
        norms: L2 norm of each tensor (of F itself, not of its root).
        means: mean of each tensor.
        normalisation: what a gradient is of, in words.
    """

    tensors: dict[str, torch.Tensor]
    num_examples: int
    kind: str
    task: str
    data_fingerprint: str
    slow_parameters: tuple[str, ...] = ()
    norms: dict[str, float] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    normalisation: str = NORMALISATION

    def __post_init__(self) -> None:
        if not self.norms:
            for name, tensor in self.tensors.items():
                self.norms[name], self.means[name] = norm_and_mean(
                    MemoryReader.of(tensor, "this Fisher"), name
                )

    @property
    def global_norm(self) -> float:
        """L2 norm over all tensors: Fisher merging of several models divides by it."""
        return sum(norm**2 for norm in self.norms.values()) ** 0.5

    def save(self, path: str | Path) -> None:
        """Write the file. A file of that name is replaced once the new one is complete.

        Raises:
            OSError: the disk is full or fails; what was there before is still there.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{STAGING_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
            beside.touch()  # readable as the user's other files are; safetensors makes files for the owner only
            mode = beside.stat().st_mode
            save_file(tensors, beside, metadata=self._metadata())
            beside.chmod(mode)
            sync(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync(path.parent)

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "n_examples": str(self.num_examples),
            "kind": self.kind,
            "task": self.task,
            "normalisation": self.normalisation,
            "data_fingerprint": self.data_fingerprint,
            "global_norm": repr(self.global_norm),
            "norms": json.dumps(self.norms),
            "means": json.dumps(self.means),
            "slow_parameters": json.dumps(self.slow_parameters),
        }

    @classmethod
    def load(cls, path: str | Path) -> "Fisher":
        """Read a file that :meth:`save` has written.

        Raises:
            ModelError: there is no such file, or it holds something else.
        """
        try:
            with safe_open(path, framework="pt") as stream:
                facts = _facts(path, stream.metadata())
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as Fisher information: {error}") from error
        return cls(
            tensors=tensors,
            num_examples=int(facts["n_examples"]),
            kind=facts["kind"],
            task=facts["task"],
            data_fingerprint=facts["data_fingerprint"],
            slow_parameters=tuple(json.loads(facts["slow_parameters"])),
            norms=json.loads(facts["norms"]),
            means=json.loads(facts["means"]),
            normalisation=facts["normalisation"],
        )


def _facts(path: str | Path, metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    if not metadata or metadata.get("format") != FORMAT:
        raise ModelError(
            f"{path} is a safetensors file, but not of Fisher information",
            hint="meldkit fisher --model MODEL --data DATA --out FILE makes one",
        )
    return metadata
