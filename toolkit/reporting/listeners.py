"""Listeners: who hears the records of a run, and the one composite that a recipe talks to."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from toolkit.reporting.records import Record

if TYPE_CHECKING:
    from toolkit.reporting.history import History

logger = logging.getLogger("toolkit.reporting")


class Listener(Protocol):
    """Hears every record of a run, in order."""

    def handle(self, record: Record) -> None: ...

    def flush(self) -> None:
        """Write down, durably, everything that was handled so far."""

    def close(self) -> None: ...


class ReportingConfig(Protocol):
    """The options that reporting reads; every recipe's configuration has them."""

    @property
    def report_to(self) -> Sequence[str]: ...
    @property
    def project(self) -> str: ...
    @property
    def run_name(self) -> str | None: ...
    @property
    def log_level(self) -> str: ...
    @property
    def logging_steps(self) -> int: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class Collector:
    """Keeps the records in a list; for tests and for callers that want nothing written."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def handle(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def of(self, kind: type) -> list[Any]:
        """The records of one class, in order."""
        return [record for record in self.records if isinstance(record, kind)]


class Listeners:
    """Passes every record on to several listeners.

    Args:
        essential: their errors (a full disk, say) end the run.
        optional: after its first error such a listener is warned about and left out; the run goes on.
    """

    def __init__(self, essential: Sequence[Listener] = (), optional: Sequence[Listener] = ()) -> None:
        self._essential = list(essential)
        self._optional = list(optional)
        self._lock = threading.RLock()
        self._closed = False
        self._waiting: deque[Record] = deque()
        self._is_passing = False

    def handle(self, record: Record) -> None:
        """Pass ``record`` on. What a listener itself says meanwhile (an alert) follows it, to all of them."""
        with self._lock:
            self._waiting.append(record)
            if self._is_passing:
                return
            self._is_passing = True
            try:
                while self._waiting:
                    self._pass(self._waiting.popleft())
            finally:
                self._is_passing = False
                self._waiting.clear()

    def _pass(self, record: Record) -> None:
        for listener in self._essential:
            listener.handle(record)
        for listener in list(self._optional):
            with self._spared(listener):
                listener.handle(record)

    def flush(self) -> None:
        """Make the history on the disk as long as the run.

        Call it before a checkpoint is committed: then a resume from that checkpoint finds every step up to
        it.
        """
        with self._lock:
            for listener in self._essential:
                listener.flush()

    def close(self) -> None:
        """Close all listeners. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for listener in list(self._optional):
                with self._spared(listener):
                    listener.close()
            with contextlib.ExitStack() as stack:
                for listener in reversed(self._essential):
                    stack.callback(listener.close)

    @contextlib.contextmanager
    def _spared(self, listener: Listener) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if listener in self._optional:
                self._optional.remove(listener)
            name = type(listener).__name__
            logger.warning(
                "%s stopped working and is left out from here on: %s: %s", name, type(error).__name__, error
            )
            logger.debug("%s failed", name, exc_info=True)

    def __enter__(self) -> "Listeners":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build(
    run_dir: Path,
    config: ReportingConfig,
    *,
    is_main_process: bool,
    resumed_history: Mapping[str, int] | None = None,
    stream: TextIO | None = None,
    story_name: str | None = None,
    watchers: "Callable[[History], Sequence[Listener]]" = lambda _: (),
) -> Listeners:
    """Make everything that a run reports to: terminal, training.log, history, metrics, trackers, report.html.

    Args:
        run_dir: the run directory; created if it is missing.
        config: the run's configuration.
        is_main_process: False on ranks other than 0, where nothing is shown or written.
        resumed_history: on a resume, participant to the step that was restored (0: from its beginning). What
            the files hold beyond that step is dropped; everything before is continued. None: a fresh run.
        stream: where the terminal output goes; None: standard output.
        story_name: file for what training.log says apart from the steps; None: no such file.
        watchers: given the history, makes further essential listeners, which hear each record right after it.

    Raises:
        MissingDependencyError: a tracker that is asked for is not installed; nothing was written.

    Returns:
        The composite. Use it as a context manager or close it, or the last steps may be missing in the files.
    """
    if not is_main_process:
        return Listeners()
    from toolkit.reporting.console import Console
    from toolkit.reporting.history_writer import HistoryWriter
    from toolkit.reporting.log_file import LogFile
    from toolkit.reporting.report import ReportWriter
    from toolkit.reporting.trackers import build_trackers, missing_trackers

    for error in missing_trackers(config):
        raise error
    run_dir.mkdir(parents=True, exist_ok=True)
    history = HistoryWriter(run_dir, logging_steps=config.logging_steps, restored_steps=resumed_history)
    train_loss = history.history.train_loss_before
    trackers = build_trackers(run_dir, config, restored_steps=resumed_history)
    log_file = LogFile(
        run_dir / "training.log",
        level=config.log_level,
        logging_steps=config.logging_steps,
        train_loss=train_loss,
        story_path=run_dir / story_name if story_name else None,
    )
    console = Console(stream=stream, log_level=config.log_level, train_loss=train_loss)
    report = ReportWriter(run_dir, history.history, config=config.model_dump(mode="json"))
    # The history is first, because the others read it; terminal and log are last, to hear how the others
    # fared.
    essential = [history, *watchers(history.history)]
    return Listeners(essential=essential, optional=[*trackers, report, console, log_file])
