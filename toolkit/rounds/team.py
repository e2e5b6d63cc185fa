"""The processes of a run whose participants are spread over them.

Under ``accelerate launch`` with several ranks every participant lives on one of them and is trained there alone, as if
there were one process; ranks meet at the end of an epoch, in merges and in commits. So transformers and accelerate must
not see the launcher's world (they would train one model together): :func:`join_team` takes it over and hides it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from toolkit.errors import LaunchError
from toolkit.launch.plan import LaunchPlan

ItemT = TypeVar("ItemT")
_OF_THE_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
)
"""Variables by which libraries tell that they are one of several processes."""


class Team:
    """The ranks of a run, or the one process that it has.

    Attributes:
        rank, num_ranks: of this process, and of all: torch.distributed's default group. Nothing of ours keeps that
            group: gloo's threads abort a process that ends while somebody holds it.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank = rank
        self.num_ranks = num_ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own(self, items: Sequence[ItemT]) -> list[ItemT]:
        """The items that are this rank's: dealt out in turn."""
        return list(items[self.rank :: self.num_ranks])

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, by rank. On all ranks, which wait for each other."""
        if self.num_ranks == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.num_ranks
        # As text: an object would be pickled.
        dist.all_gather_object(gathered, json.dumps(value))
        return [json.loads(text) for text in gathered]

    def collect(self, own: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
        """What every rank says of its own participants, by participant. On all ranks.

        Args:
            own: JSON values of this rank's.
            order: of the participants of all ranks; those of whom nobody says anything are left out.
        """
        found = {name: value for values in self.gather(dict(own)) for name, value in values.items()}
        return {name: found[name] for name in order if name in found}

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather(None)


def join_team(plan: LaunchPlan) -> tuple[Team, LaunchPlan]:
    """Take over the launcher's world.

    Returns:
        The team, and the plan of this process by itself: one process on its own device.

    Raises:
        LaunchError: the launcher left no place to meet.
    """
    if plan.num_processes == 1:
        return Team(), plan
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise LaunchError(f"{plan.num_processes} processes, and {name} is not set: they cannot meet")
    for name in _OF_THE_LAUNCHER:
        os.environ.pop(name, None)
    gpus = plan.gpus[local_rank : local_rank + 1]
    alone = dataclasses.replace(plan, num_processes=1, num_machines=1, gpus=gpus)
    os.environ.update(alone.environment())
    import torch.distributed as dist

    from toolkit.training.world import LONGEST_WAIT

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent listens on the port itself.
    uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        address, port, plan.num_processes, is_master=rank == 0 and not uses_agent, timeout=LONGEST_WAIT
    )
    dist.init_process_group(
        "gloo" if plan.device == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore("meldkit", store),
        rank=rank,
        world_size=plan.num_processes,
        timeout=LONGEST_WAIT,
    )
    return Team(rank, plan.num_processes), alone
