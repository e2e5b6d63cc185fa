"""One rank of the tests of merging over ranks: PORT RANK NUM_RANKS FOLDER PARTS, functions below."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from merging_cases import CASES, EACH_WEIGHTS, PARTICIPANTS, Case, algorithm, options
from safetensors.torch import save_file

from toolkit.errors import MeldkitError
from toolkit.rounds.merging import Contribution, MergeCoordinator, MergeOutcome


def mine(rank: int, num_ranks: int) -> list[int]:
    """Numbers of a rank's participants; of three ranks the last has none."""
    return [number for number in range(len(PARTICIPANTS)) if number % min(num_ranks, 2) == rank]


def coordinator(case: Case, **more: object) -> MergeCoordinator:
    return MergeCoordinator(options(**case.options), **case.coordinator_options(), is_spread=True, **more)


def write(folder: Path, name: str, outcome: MergeOutcome) -> None:
    rank = dist.get_rank()
    save_file(outcome.state, folder / f"{name}.{rank}.safetensors")
    facts = {
        "weights": outcome.weights,
        "method": outcome.method,
        "input_sha256": outcome.input_sha256,
        "output_sha256": outcome.output_sha256,
        "integrity": outcome.integrity,
        "notes": outcome.notes,
        "names": list(outcome.state),
    }
    (folder / f"{name}.{rank}.json").write_text(json.dumps(facts))


def merges(folder: Path) -> None:
    """Every case, in buckets of a few hundred elements, and a mixture for each of some participants."""
    numbers = mine(dist.get_rank(), dist.get_world_size())
    for name, case in CASES.items():
        contributions = [case.contribution(number) for number in numbers]
        outcome = coordinator(case, exchange_bytes=5 * 3000).merge(contributions, label=name)
        write(folder, name, outcome)
    case = CASES["linear"]
    contributions = [case.contribution(number) for number in numbers]
    for target, outcome in coordinator(case, exchange_bytes=5 * 3000).merge_each(
        contributions, EACH_WEIGHTS, label="each"
    ):
        write(folder, f"each-{target}", outcome)


def memory(folder: Path) -> None:
    """How much a merge adds to the peak of three participants on each of two ranks, one tensor being nearly all."""
    rank = dist.get_rank()
    names = [f"p{number}" for number in range(6)]
    own = names[rank::2]
    for method in ("linear", "fisher"):
        for size in (2, 4000):  # first small: what is compiled and loaded once
            merging = MergeCoordinator(
                options(**algorithm(method)),
                participants=names,
                is_spread=True,
                exchange_bytes=size * 3 * 2**10,
            )
            state = {"embeddings": torch.full((3000, size), rank + 1.0), "head": torch.ones(9)}
            contributions = [
                Contribution(
                    participant=name,
                    state={key: tensor.clone() for key, tensor in state.items()},
                    weight=1 / 6,
                    fisher=state if method == "fisher" else None,
                )
                for name in own
            ]
            held = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            merging.merge(contributions, label=method)
            (folder / f"memory-{method}.{rank}.json").write_text(json.dumps(resident("VmHWM") - held))
            del contributions


def resident(name: str) -> int:
    """A number of bytes that the system says of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def failures(folder: Path) -> None:
    """What every rank says of NaN on one rank, of states that differ, and of weights that are wrong on one."""
    rank = dist.get_rank()
    case = CASES["linear"]
    said = {}
    for name in ("nan", "shape", "weight", "missing"):
        contributions = [case.contribution(number) for number in mine(rank, dist.get_world_size())]
        if rank == 1:
            first = contributions[0]
            state, weight = dict(first.state), first.weight
            if name == "nan":
                state["layer.0.weight"] = torch.full_like(state["layer.0.weight"], float("nan"))
            if name == "shape":
                state["norm.weight"] = torch.ones(3)
            if name == "weight":
                weight = -1.0
            if name == "missing":
                state.pop("norm.weight")
            contributions[0] = Contribution(participant=first.participant, state=state, weight=weight)
            if name in ("shape", "missing"):
                contributions = contributions[:1]
        if rank == 0 and name in ("shape", "missing"):  # weights that still add up
            contributions = [
                Contribution(
                    participant=c.participant, state=c.state, weight=0.9 if c is contributions[0] else 0.0
                )
                for c in contributions
            ]
        try:
            coordinator(case).merge(contributions, label=name)
            said[name] = ["nothing", ""]
        except MeldkitError as error:
            said[name] = [type(error).__name__, error.message]
    # They are in step all the same.
    outcome = coordinator(case).merge([case.contribution(n) for n in mine(rank, 2)], label="linear")
    said["afterwards"] = ["", outcome.output_sha256]
    (folder / f"failures.{rank}.json").write_text(json.dumps(said))


def silence(folder: Path) -> None:
    """One rank never takes part: the other gives up in time."""
    if dist.get_rank() == 1:
        time.sleep(30)
        return
    case = CASES["linear"]
    started = time.monotonic()
    try:
        MergeCoordinator(options(merge_timeout=2.0), participants=PARTICIPANTS, is_spread=True).merge(
            [case.contribution(0)], label="silence"
        )
        said = "nothing"
    except MeldkitError as error:
        said = f"{type(error).__name__}: {error.message}"
    facts = {"said": said, "seconds": time.monotonic() - started}
    (folder / "silence.json").write_text(json.dumps(facts))
    os._exit(0)  # the group is of no use any more


def main() -> None:
    port, rank, num_ranks, folder, parts = sys.argv[1:]
    store = dist.TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(num_ranks), timeout=timedelta(seconds=120)
    )
    for part in parts.split(","):
        globals()[part](Path(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
