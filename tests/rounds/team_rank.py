"""One rank of the test of a team: PORT RANK NUM_RANKS FOLDER."""

import dataclasses
import json
import os
import sys
import weakref
from pathlib import Path

import torch.distributed as dist

from toolkit.config.load import load
from toolkit.config.recipes import IterativeConfig
from toolkit.launch.plan import resolve_plan
from toolkit.rounds.team import join_team
from toolkit.training.world import close_world

port, rank, num_ranks, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
config = load(IterativeConfig, ["--locales", "en-US,fr-FR,de-DE", "--cpu"]).config
plan = dataclasses.replace(resolve_plan(config), num_processes=num_ranks)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
team, alone = join_team(plan)
found = {
    "rank": team.rank,
    "is_main": team.is_main,
    "own": team.own(config.locales),
    "gathered": team.gather({"rank": rank, "text": "ü", "nothing": None}),
    "num_processes": alone.num_processes,
    "hidden": [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ],
}
team.wait()
group = weakref.ref(dist.group.WORLD)
close_world()
# Whoever holds the group until the process ends lets gloo abort it, now and then.
found["holds_group"] = group() is not None
(folder / f"{rank}.json").write_text(json.dumps(found))
