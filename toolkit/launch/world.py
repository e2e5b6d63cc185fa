"""What a launcher (accelerate launch, torchrun, deepspeed, our own) left in the environment of its processes.

Every launcher speaks through environment variables; this module is the only one that reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.errors import LaunchError

RANK_FOLDER_VARIABLE = "MELDKIT_RANK_FOLDER"
"""Set by our own launcher: the folder in which each process reports (see ``status.py``)."""

PARENT_VARIABLE = "MELDKIT_PARENT_PID"
"""Set by our own launcher, and by the agent for the ranks: the process that the new one must not outlive."""

TASK_FILE_VARIABLE = "MELDKIT_TASK_FILE"
"""Set by our own launcher: the file in which a process says what it is at (see ``status.py``)."""

_YES = frozenset({"1", "true", "yes", "y", "on", "t"})


def is_set(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in _YES


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether this process was started by accelerate launch, torchrun, deepspeed or our launcher.

    ``accelerate launch`` with one process sets no rank, only its ``ACCELERATE_*`` variables. ``WORLD_SIZE``
    alone is no sign: cluster software sets it for a container, in which nobody has launched anything yet.
    """
    return "LOCAL_RANK" in environ or "ACCELERATE_MIXED_PRECISION" in environ


@dataclass(frozen=True)
class LaunchedWorld:
    """The world that a launcher made.

    Attributes:
        launcher: its name, for messages.
        is_ours: made by :mod:`toolkit.launch.launcher`.
        num_processes, num_processes_per_machine, rank, local_rank: as usual.
        asks_cpu: ``accelerate launch --cpu``.
        mixed_precision: what accelerate was told, ``no`` also when it was told nothing; None under torchrun.
        deepspeed: ``zero1`` to ``zero3`` or the path of a configuration, from ``accelerate launch
            --use_deepspeed``.
    """

    launcher: str
    is_ours: bool
    num_processes: int
    num_processes_per_machine: int
    rank: int
    local_rank: int
    asks_cpu: bool
    mixed_precision: str | None
    deepspeed: str | None

    @property
    def num_machines(self) -> int:
        return self.num_processes // self.num_processes_per_machine


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise LaunchError(
            f"the environment variable {name} is {text!r}, not a number",
            hint="a launcher sets it; unset it to start without one",
        )
    return int(text)


def launched_world(environ: Mapping[str, str]) -> LaunchedWorld | None:
    """Read the world from the environment; None where no launcher made one.

    Raises:
        LaunchError: variables that contradict one another, or a way of sharding that meldkit does not drive.
    """
    if not is_launched(environ):
        return None
    num_processes = _number(environ, "WORLD_SIZE", 1) if "LOCAL_RANK" in environ else 1
    local_rank = _number(environ, "LOCAL_RANK", 0)
    rank = _number(environ, "RANK", local_rank)
    num_local = _number(environ, "LOCAL_WORLD_SIZE", num_processes)
    if not (0 <= local_rank < num_local and rank < num_processes) or num_processes % num_local:
        raise LaunchError(
            f"the environment of this process contradicts itself: RANK={rank} of WORLD_SIZE={num_processes}, "
            f"LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={num_local}",
            hint="unset these variables to start without a launcher",
        )
    for variable, flag in (
        ("ACCELERATE_USE_FSDP", "--use_fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "--use_megatron_lm"),
    ):
        if is_set(environ, variable):
            raise LaunchError(
                f"accelerate launch {flag} is not supported",
                hint="--deepspeed zero3 shards the model as well",
            )
    is_ours = RANK_FOLDER_VARIABLE in environ
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ
    return LaunchedWorld(
        launcher="meldkit's launcher" if is_ours else "accelerate launch" if by_accelerate else "torchrun",
        is_ours=is_ours,
        num_processes=num_processes,
        num_processes_per_machine=num_local,
        rank=rank,
        local_rank=local_rank,
        asks_cpu=is_set(environ, "ACCELERATE_USE_CPU"),
        mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION"),
        deepspeed=_launched_deepspeed(environ),
    )


def _launched_deepspeed(environ: Mapping[str, str]) -> str | None:
    if not is_set(environ, "ACCELERATE_USE_DEEPSPEED"):
        return None
    if path := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return path
    # 2 is accelerate's own default.
    return f"zero{environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
