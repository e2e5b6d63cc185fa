"""Ranks that share a run's participants."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.config.load import load
from toolkit.config.recipes import IterativeConfig
from toolkit.errors import LaunchError
from toolkit.launch.plan import resolve_plan
from toolkit.rounds.team import Team, join_team


@pytest.fixture
def plan(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "MASTER_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return resolve_plan(load(IterativeConfig, ["--locales", "en-US,fr-FR", "--cpu"]).config)


@pytest.mark.parametrize("num_items", [2, 3, 7])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_item_has_one_rank_and_all_have_nearly_as_many(num_items, num_ranks):
    items = [f"p{number}" for number in range(num_items)]
    dealt = [Team(rank, num_ranks).own(items) for rank in range(num_ranks)]
    assert sorted(item for own in dealt for item in own) == items
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_one_process_is_a_team_by_itself(plan):
    team, own_plan = join_team(plan)
    assert own_plan is plan
    assert (team.is_main, team.num_ranks) == (True, 1)
    assert team.gather({"a": 1}) == [{"a": 1}]


def test_ranks_without_a_place_to_meet(plan, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(LaunchError, match="MASTER_ADDR is not set: they cannot meet"):
        join_team(dataclasses.replace(plan, num_processes=2))


def test_two_ranks_meet_and_hide_the_launchers_world(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("team_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(rank), "2", tmp_path], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [entry["own"] for entry in found] == [["en-US", "de-DE"], ["fr-FR"]]
    assert [entry["is_main"] for entry in found] == [True, False]
    said = [{"rank": rank, "text": "ü", "nothing": None} for rank in range(2)]
    assert [entry["gathered"] for entry in found] == [said, said]
    assert [entry["num_processes"] for entry in found] == [1, 1]
    assert [entry["hidden"] for entry in found] == [[], []]
    assert [entry["holds_group"] for entry in found] == [False, False]
