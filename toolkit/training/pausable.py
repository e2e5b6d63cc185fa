"""A call that can be paused in the middle and continued later, on one thread.

``Trainer.train()`` is one long call that owns optimizer, scheduler, data position and loop counters. To merge between
epochs it must stop inside that call, let other participants train, and go on: rebuilding a Trainer for each epoch
loses what it owns. The call therefore runs in a greenlet, a second Python stack on the same thread. Against a thread
with a hand-over lock this needs no lock, keeps CUDA's current device, torch's grad mode and OpenMP's worker pool
(both are per thread), delivers Ctrl-C where it is expected, and raises an error of the paused call where the caller
stands. ``bench/pausable.py`` measures both.
"""

import contextvars
from collections.abc import Callable

import greenlet


class PausableCall:
    """Runs ``function()``; whatever runs inside it may call :meth:`pause`.

    Errors that ``function`` raises come out of the :meth:`resume` that ran it.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._stack = greenlet.greenlet(function)
        self._stack.gr_context = contextvars.copy_context()
        self._started = False

    @property
    def finished(self) -> bool:
        return self._started and self._stack.dead

    def resume(self) -> None:
        """Start or continue the call; returns at its next pause or its end."""
        self._started = True
        self._stack.parent = greenlet.getcurrent()
        self._stack.switch()

    def pause(self) -> None:
        """Return to the caller of :meth:`resume`. Only from inside the call."""
        assert greenlet.getcurrent() is self._stack, "pause() belongs inside the call that is paused"
        caller = self._stack.parent
        assert caller is not None
        caller.switch()

    def close(self) -> None:
        """End a paused call: its ``finally`` blocks run, the rest of it does not."""
        if self._started and not self._stack.dead:
            self._stack.parent = greenlet.getcurrent()
            self._stack.throw(greenlet.GreenletExit)
