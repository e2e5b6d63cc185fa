"""The participants of a rank that the system killed: the others go on, and so do they if that can be.

    a rank is killed while it works on fr-FR        the launcher sees it; the other ranks hang in a collective, and end
    :class:`GoOn`, in the launcher's process        the same command again with --resume, and with what was killed
    :func:`killings_of`, in the ranks               fr-FR is taken back to its last checkpoint, or is out

No rank can do that alone: a process group does not outlive a member.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit.launch.ending import KilledRank
from toolkit.launch.launcher import Restart

VARIABLE = "MELDKIT_KILLINGS"
"""Set for the ranks of a run that goes on: every :class:`Killing` since it was started, as JSON."""
NUM_RECOVERIES = 1
"""How often a participant that failed is taken back to its last checkpoint: the same error twice is no accident."""


@dataclass(frozen=True)
class Killing:
    """One rank's end.

    Attributes:
        id: of its own: a participant counts each of them once, also when it is resumed many times.
        participant: whom the rank was working on; empty where nobody in particular.
        reason: for the participant's record.
    """

    id: int
    participant: str
    reason: str


def num_recoveries(config: Any) -> int:
    """How often one participant of a run is taken back to its last checkpoint."""
    return NUM_RECOVERIES if config.enable_auto_recovery else 0


def killings_of(participant: str) -> list[Killing]:
    """Those that this process was told of, oldest first."""
    known = [Killing(**entry) for entry in json.loads(os.environ.get(VARIABLE, "[]"))]
    return [killing for killing in known if killing.participant == participant]


class GoOn:
    """Decides how a run goes on after one of its ranks was killed.

    A participant that the rank was working on is taken back (``--enable-auto-recovery``, once) or left out, so that
    there is an end to it. Where the rank was at nobody's work (starting, merging) the run goes on once, with
    ``--enable-auto-recovery``.

    Args:
        config: the recipe's options.
        argv: that it was started with.
    """

    def __init__(self, config: Any, argv: list[str]) -> None:
        self._config = config
        self._more = [] if "--resume" in argv else ["--resume"]
        self._killings: list[Killing] = []

    def __call__(self, killed: KilledRank) -> Restart | None:
        reason = f"its process was killed by {killed.signal_name}"
        self._killings.append(Killing(time.time_ns(), killed.task, reason))
        times = sum(killing.participant == killed.task for killing in self._killings)
        allowed = num_recoveries(self._config) + bool(killed.task)
        if times > allowed or not (Path(self._config.output_dir) / "experiment_config.json").is_file():
            return None
        is_out = killed.task and times > num_recoveries(self._config)
        message = "the run goes on from its last commit" + (f", without {killed.task}" if is_out else "")
        told = json.dumps([asdict(killing) for killing in self._killings])
        return Restart(self._more, {VARIABLE: told}, message)
