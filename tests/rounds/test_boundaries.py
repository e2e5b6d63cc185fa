import pytest

from toolkit.rounds.boundaries import Boundaries


@pytest.mark.parametrize(
    ("eval_every", "checkpoint_every", "stops"),
    [
        ("epoch", "never", [5, 10, 12]),
        ("never", "never", [12]),
        ("4", "never", [4, 8, 12]),
        ("4", "epoch", [4, 5, 8, 10, 12]),
        ("never", "3", [3, 6, 9, 12]),
        ("100", "100", [12]),
    ],
)
def test_stops(eval_every, checkpoint_every, stops):
    boundaries = Boundaries(12, 5, eval_every=eval_every, checkpoint_every=checkpoint_every)
    step, seen = 0, []
    while step < 12:
        step = boundaries.next_after(step)
        seen.append(step)
    assert seen == stops
    for at in range(1, 12):
        period = {"epoch": 5, "never": None}.get(eval_every, eval_every)
        assert boundaries.evaluate_at(at) == (period is not None and at % int(period) == 0)
    assert not boundaries.evaluate_at(12)
    assert not boundaries.checkpoint_at(12)
