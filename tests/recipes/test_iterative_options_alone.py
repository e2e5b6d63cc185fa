"""Options of iterative training whose effect takes more than one look; the others are in test_iterative_options.py."""

from typing import Any

import pytest

THREE = ("--locales", "en-US,fr-FR,de-DE")
FISHER = ("--merge-algorithm", "fisher_dataset", "--num-fisher-examples", 12)


def test_participants_in_turns_have_the_same_bits(iterated):
    plain, turns = iterated(*THREE), iterated(*THREE, "--participants-per-step", 2)
    assert turns.weights == plain.weights
    assert [m["after"] for m in turns.merges] == [m["after"] for m in plain.merges]

    def order(run) -> list[str]:
        return [step["participant"] for step in run.steps if step["step"] <= 2]

    assert order(plain) == ["en-US"] * 2 + ["fr-FR"] * 2 + ["de-DE"] * 2
    assert order(turns) == ["en-US", "fr-FR"] * 2 + ["de-DE"] * 2


def test_fisher_batch_size(iterate, tmp_path):
    """Batches that the encoder saw in backward passes outside training: of the size that was asked for."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    seen: list[int] = []

    def note(module, arguments) -> None:
        if type(module).__name__ == "XLMRobertaEncoder":
            seen.append(len(arguments[0]))

    sizes = {}
    handle = register_module_forward_pre_hook(note)
    try:
        for size in (3, 4):
            seen.clear()
            run = iterate(tmp_path / f"{size}", *FISHER, "--fisher-batch-size", size)
            assert run.status == 0, run.err
            sizes[size] = list(seen)
    finally:
        handle.remove()
    # 2 merges, 2 locales, 12 rows each
    assert sizes[3].count(3) == 16
    assert sizes[4].count(4) == 12
    assert sizes[3].count(4) == sizes[4].count(3) == 0


def test_gate_and_its_tolerance(iterated, contrary):
    options = (*contrary, "--max-epochs", 4, "--merge-frequency", 4)
    plain, gate = iterated(*options), iterated(*options, "--merge-gate")
    tolerant = iterated(*options, "--merge-gate", "--gate-tolerance", 1)
    assert plain.merges[0]["gate"] == {"en-US": None, "fr-FR": None}
    assert "rejected" in gate.merges[0]["gate"].values()
    assert tolerant.merges[0]["gate"] == {"en-US": "accepted", "fr-FR": "accepted"}
    assert tolerant.weights == plain.weights != gate.weights


@pytest.mark.slow
def test_max_merge_frequency(iterated, contrary):
    """Merges that no locale takes make the adaptive schedule merge less often, up to the maximum."""
    options = (
        *contrary,
        "--max-epochs",
        7,
        "--merge-frequency",
        3,
        "--adaptive-merge-frequency",
        "--merge-gate",
    )
    options += ("--metric", "loss", "--adaptive-window", 9)
    assert iterated(*options).merge_epochs == [3, 7]
    assert iterated(*options, "--max-merge-frequency", 3).merge_epochs == [3, 6]


def test_merge_timeout(iterate, tmp_path):
    run = iterate(tmp_path / "run", "--merge-timeout", 1e-6)
    assert run.status == 1
    assert "not done after 1e-06 s, and given up" in run.err
    assert [(merge["status"], merge["attempts"]) for merge in run.merges] == [("failed", 1)]


@pytest.fixture
def faltering():
    """A merge method that fails at its first two visits to a tensor, as a disk does; returns the visits."""
    from toolkit.merging import registry

    visits: list[str] = []
    linear = registry.merge_methods()["linear"]

    @registry.merge_method("faltering", paper="none", parameters=linear.parameters)
    def mean(group: Any, **more: Any) -> Any:
        """The mean, at the third attempt."""
        visits.append(group.name)
        if group.name == visits[0] and visits.count(group.name) <= 2:
            raise OSError("the disk is gone")
        return linear.function(group, **more)

    yield visits
    del registry.METHODS["faltering"]


def test_max_merge_attempts(iterate, tmp_path, faltering):
    options = ("--merge-algorithm", "faltering", "--max-epochs", 1)
    run = iterate(tmp_path / "three", *options)
    assert run.status == 0, run.err
    assert run.merges[0]["attempts"] == 3
    faltering.clear()
    run = iterate(tmp_path / "two", *options, "--max-merge-attempts", 2)
    assert run.status == 1
    assert "failed after 2 attempts" in run.err
    assert "the disk is gone" in run.err
    assert [(merge["status"], merge["attempts"]) for merge in run.merges] == [("failed", 2)]


@pytest.mark.slow
def test_auto_recovery_goes_on_without_a_failed_merge(iterate, iterated, tmp_path):
    run = iterate(tmp_path / "run", "--merge-timeout", 1e-6, "--enable-auto-recovery")
    assert run.status == 0, run.err
    assert [merge["status"] for merge in run.merges] == ["failed", "failed"]
    assert run.weights == iterated("--merge-frequency", 9).weights
