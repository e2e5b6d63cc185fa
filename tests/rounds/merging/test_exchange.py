"""Participants spread over ranks: the bits of one process, and never the states of all in one place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(
    0, str(Path(__file__).parent)
)  # merging_cases.py is shared with the ranks, which are processes of their own

from merging_cases import CASES, EACH_WEIGHTS, PARTICIPANTS, options

from toolkit.rounds.merging import MergeCoordinator


def run_ranks(part: str, folder: Path, num_ranks: int = 2, timeout_seconds: float = 300) -> None:
    """Run a function of exchange_ranks.py on ranks over gloo on 127.0.0.1, on a port that the system chose."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = Path(__file__).with_name("exchange_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, (store.port, rank, num_ranks, folder, part))],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=timeout_seconds)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def expected():
    """The outcome of every case in one process, made before the ranks so that they find compiled kernels."""
    outcomes = {}
    for name, case in CASES.items():
        merging = MergeCoordinator(options(**case.options), **case.coordinator_options())
        contributions = [case.contribution(number) for number in range(len(PARTICIPANTS))]
        outcomes[name] = merging.merge(contributions, label=name)
    case = CASES["linear"]
    merging = MergeCoordinator(options(**case.options), **case.coordinator_options())
    contributions = [case.contribution(number) for number in range(len(PARTICIPANTS))]
    for target, outcome in merging.merge_each(contributions, EACH_WEIGHTS, label="each"):
        outcomes[f"each-{target}"] = outcome
    return outcomes


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, expected, tmp_path_factory) -> tuple[Path, int]:
    """A folder of what two ranks say, and one of three, of which the last has no participants."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    run_ranks("memory,merges,failures" if request.param == 2 else "merges", folder, request.param)
    return folder, request.param


def test_every_case_has_the_bits_of_one_process(ranks, expected):
    folder, num_ranks = ranks
    for name in CASES:
        for rank in range(num_ranks):
            merged = load_file(folder / f"{name}.{rank}.safetensors")
            alone = expected[name].state
            assert merged.keys() == alone.keys(), name
            assert [n for n in alone if not torch.equal(alone[n], merged[n])] == [], (name, rank)


def test_every_rank_knows_all_of_the_outcome(ranks, expected):
    folder, num_ranks = ranks
    for name in CASES:
        for rank in range(num_ranks):
            facts = json.loads((folder / f"{name}.{rank}.json").read_text())
            alone = expected[name]
            assert facts["names"] == list(alone.state)
            products = facts["integrity"].pop("products", {})
            assert products == alone.integrity.get("products", {}), name
            assert facts["integrity"] == {k: v for k, v in alone.integrity.items() if k != "products"}, name
            same = ("weights", "method", "input_sha256", "output_sha256", "notes")
            assert {key: facts[key] for key in same} == {key: getattr(alone, key) for key in same}, name


def test_mixtures_go_to_the_ranks_of_their_participants(ranks, expected):
    folder, num_ranks = ranks
    for target in EACH_WEIGHTS:
        owner = PARTICIPANTS.index(target) % 2
        present = [rank for rank in range(num_ranks) if (folder / f"each-{target}.{rank}.json").exists()]
        assert present == [owner]
        merged = load_file(folder / f"each-{target}.{owner}.safetensors")
        alone = expected[f"each-{target}"].state
        assert [n for n in alone if not torch.equal(alone[n], merged[n])] == [], target


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_no_rank_holds_the_states_of_all(ranks):
    state_bytes = 3000 * 4000 * 4
    for method in ("linear", "fisher"):
        for rank in range(2):
            added = json.loads((ranks[0] / f"memory-{method}.{rank}.json").read_text())
            # The result, and parts: theirs, those sent, the merged ones, what gloo holds of them.
            assert state_bytes <= added < state_bytes + 5 * 12 * 2**20, (method, rank)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_what_is_wrong_on_one_rank_is_said_on_all_and_they_stay_in_step(ranks, expected):
    first, second = (json.loads((ranks[0] / f"failures.{rank}.json").read_text()) for rank in range(2))
    assert {name: kind for name, (kind, _) in first.items()} == {
        "nan": "MergeError",
        "shape": "ModelError",
        "weight": "InputError",
        "missing": "ModelError",
        "afterwards": "",
    }
    assert {name: kind for name, (kind, _) in second.items()} == {
        name: kind for name, (kind, _) in first.items()
    }
    for said in (first, second):
        assert "layer.0.weight: state of fr-FR holds NaN or infinity" in said["nan"][1]
        assert "the weight of fr-FR is -1.0" in said["weight"][1]
        assert said["nan"][1].startswith("merge nan: ")
    assert first["afterwards"] == second["afterwards"] == ["", expected["linear"].output_sha256]


@pytest.mark.slow
@pytest.mark.faults
def test_a_rank_that_says_nothing_is_not_waited_for(tmp_path):
    run_ranks("silence", tmp_path)
    facts = json.loads((tmp_path / "silence.json").read_text())
    assert facts["said"].startswith("RunError: merge silence: ")
    assert 2.0 <= facts["seconds"] < 28.0
