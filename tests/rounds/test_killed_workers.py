"""What follows when the system kills a rank."""

import json
from types import SimpleNamespace

import pytest

from toolkit.launch.ending import KilledRank
from toolkit.rounds.killed_workers import VARIABLE, GoOn, killings_of


@pytest.fixture
def go_on(tmp_path):
    def make(enable_auto_recovery: bool) -> GoOn:
        (tmp_path / "experiment_config.json").touch()
        config = SimpleNamespace(output_dir=tmp_path, enable_auto_recovery=enable_auto_recovery)
        return GoOn(config, ["--locales", "en-US,fr-FR"])

    return make


def killed(task: str) -> KilledRank:
    return KilledRank(1, 4711, "SIGKILL", task)


def test_a_locale_is_taken_back_once_and_then_left_out(go_on):
    decide = go_on(True)
    first = decide(killed("fr-FR"))
    assert first is not None
    assert first.arguments == ["--resume"]
    assert first.message == "the run goes on from its last commit"
    assert len(json.loads(first.variables[VARIABLE])) == 1
    second = decide(killed("fr-FR"))
    assert second is not None
    assert second.message.endswith(", without fr-FR")
    assert [entry["participant"] for entry in json.loads(second.variables[VARIABLE])] == ["fr-FR"] * 2
    assert decide(killed("fr-FR")) is None  # it was out, and the rank was killed nevertheless
    assert decide(killed("en-US")) is not None


def test_without_recovery_it_is_left_out_at_once(go_on):
    decide = go_on(False)
    restart = decide(killed("fr-FR"))
    assert restart is not None
    assert restart.message.endswith(", without fr-FR")
    assert decide(killed("fr-FR")) is None


def test_where_nobody_is_to_blame_recovery_decides(go_on):
    assert go_on(False)(killed("")) is None
    decide = go_on(True)
    restart = decide(killed(""))
    assert restart is not None
    assert restart.message == "the run goes on from its last commit"
    assert decide(killed("")) is None


def test_a_run_that_has_not_begun_ends(go_on, tmp_path):
    decide = go_on(True)
    (tmp_path / "experiment_config.json").unlink()
    assert decide(killed("fr-FR")) is None


def test_ranks_are_told(go_on, monkeypatch):
    assert killings_of("fr-FR") == []
    decide = go_on(True)
    decide(killed("en-US"))
    restart = decide(killed("fr-FR"))
    monkeypatch.setenv(VARIABLE, restart.variables[VARIABLE])
    [killing] = killings_of("fr-FR")
    assert killing.reason == "its process was killed by SIGKILL"
    assert killing.id != killings_of("en-US")[0].id
