import os
import signal

import pytest

from toolkit.errors import Interrupted
from toolkit.rounds import signals
from toolkit.rounds.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_leaves(number, monkeypatch):
    announced = []
    before = signal.getsignal(number)
    with StopRequest(announced.append) as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        os.kill(os.getpid(), number)  # within a second: the same request, sent to launcher and process both
        assert announced == [number.name]
        monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)
        with pytest.raises(Interrupted, match="again"):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
