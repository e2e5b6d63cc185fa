"""What a rank does in the launcher's tests: ``python -m rank_probe ACTION ARGUMENTS``."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from toolkit.launch import status


def all_reduce() -> int:
    """Join the world of the plan and sum the rank numbers + 1 over all processes."""
    import torch
    from accelerate import PartialState

    from toolkit.config.options import LaunchOptions
    from toolkit.launch.plan import resolve_plan
    from toolkit.training.world import prepare_world

    prepare_world(resolve_plan(LaunchOptions(num_processes=2, cpu=True)))
    state = PartialState()
    total = torch.tensor([state.process_index + 1.0])
    torch.distributed.all_reduce(total)
    print(f"rank {state.process_index} of {state.num_processes}: sum {int(total.item())}")
    return 0


def end_with(*exit_statuses: str) -> int:
    """End with the status given for this rank."""
    rank = int(os.environ["RANK"])
    print(f"output of rank {rank}")
    print(f"error of rank {rank}", file=sys.stderr)
    return int(exit_statuses[rank])


def be_killed(name: str, others: str = "wait", more: str = "") -> int:
    """Rank 1 is killed by a signal at its work; the others wait for it as in a collective, or miss it at once. Nothing
    of that with ``more``: it ends well."""
    if more:
        print(f"rank {os.environ['RANK']} of {more}, {os.environ['TOLD']}")
        return 0
    folder, rank = Path(os.environ["MELDKIT_RANK_FOLDER"]), int(os.environ["RANK"])
    if rank == 1:
        status.say_task("fr-FR")
        (folder / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.Signals[name])
    while others != "miss" or not is_dead(folder / "pid"):
        time.sleep(0.001)
    return 1


def is_dead(path: Path) -> bool:
    """Whether the process of that id is over; its parent may not have noticed."""
    if not path.exists():
        return False
    try:
        return ") Z " in Path(f"/proc/{path.read_text()}/stat").read_text()
    except OSError:
        return True


def wait_for_signal(folder: str, *, ends: str = "yes") -> int:
    """Say that the handler is there, then wait; on a signal end as an interrupted recipe does."""
    received: list[str] = []

    def handle(signal_number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(signal_number).name)
        (Path(folder) / f"got-{os.environ['RANK']}").write_text(",".join(received))

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(signal.Signals[name], handle)
    (Path(folder) / f"ready-{os.environ['RANK']}").write_text(str(os.getpid()))
    while not received or ends == "no":
        time.sleep(0.05)
    if os.environ["RANK"] == "0":
        time.sleep(1)  # rank 0 still writes its checkpoint when the others are done
        (Path(folder) / "checkpoint").write_text("whole")
    return 75


def never_end(folder: str) -> int:
    return wait_for_signal(folder, ends="no")


if __name__ == "__main__":
    actions = {f.__name__: f for f in (all_reduce, end_with, be_killed, wait_for_signal, never_end)}
    sys.exit(actions[sys.argv[1]](*sys.argv[2:]))
