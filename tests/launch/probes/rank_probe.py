"""What a rank does in the launcher's tests: ``python -m rank_probe ACTION ARGUMENTS``."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


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


def be_killed(name: str) -> int:
    """Rank 1 is killed by a signal, the others wait for it as in a collective."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.Signals[name])
    time.sleep(600)
    return 0


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
