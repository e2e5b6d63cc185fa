"""Talking between ranks within a time limit: small facts as JSON, tensors as bytes."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import RunError
from toolkit.rounds.merging.attempts import GRACE_SECONDS, Deadline


class Wire:
    """One merge's view of torch.distributed's default group.

    Args:
        deadline: after which no answer is waited for.
    """

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        # NCCL moves memory of the GPU, gloo of the host.
        on_gpu = "nccl" in str(dist.get_backend())
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, by rank."""
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.num_ranks)]
        own_size = torch.tensor([content.numel()], device=self.device)
        self._wait([dist.all_gather(sizes, own_size, async_op=True)])
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: content.numel()] = content
        received = [torch.empty_like(padded) for _ in range(self.num_ranks)]
        self._wait([dist.all_gather(received, padded, async_op=True)])
        return [
            json.loads(bytes(entry[: int(size)].tolist()))
            for entry, size in zip(received, sizes, strict=True)
        ]

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        """Send tensors to ranks and fill tensors from ranks; between two ranks the order is the same on both."""
        operations = [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in receives]
        operations += [dist.P2POp(dist.isend, tensor, rank) for tensor, rank in sends]
        if operations:
            self._wait(dist.batch_isend_irecv(operations))

    def _wait(self, works: Sequence[Any]) -> None:
        for work in works:
            try:
                work.wait(timedelta(seconds=self._deadline.remaining() + GRACE_SECONDS))
            except RuntimeError as error:
                # The ranks are out of step now: what is sent next would be taken for something else.
                raise RunError(
                    f"rank {self.rank}: another rank did not answer while states were merged: "
                    f"{str(error).splitlines()[0]}",
                    hint="look at the log for the rank that ended first, and run again with --resume",
                ) from error
