import contextlib
import dataclasses
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import warnings

import pytest
import rich.console
from rich.cells import cell_len

from toolkit.reporting.console import Console, one_line
from toolkit.reporting.listeners import Listeners
from toolkit.reporting.progress import Progress, ProgressBars
from toolkit.reporting.records import MessageRecord, StepRecord

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def plain_run(fake_run, names, num_steps, *, clock=lambda: 0.0, **options) -> list[str]:
    stream = io.StringIO()
    console = Console(stream=stream, clock=clock, **options)
    console.handle(fake_run.start(names, num_steps))
    for record in fake_run.records(names, num_steps):
        console.handle(record)
    console.handle(fake_run.end(fake_run.Path("out")))
    console.close()
    return stream.getvalue().splitlines()


def test_a_pipe_gets_the_documented_lines_and_no_control_codes(fake_run):
    lines = plain_run(fake_run, ["model"], 5000)
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "Training Configuration:\n" in text
    for line in ("  Training samples: 800", "  Validation samples: 100", "  Effective batch size: 8"):
        assert line in lines
    assert "Model saved to: out/final_model" in lines
    assert re.search(r"epoch 1/3.*train_loss: \S+, eval_loss: \S+", text) is None  # no history to ask
    assert re.search(r"epoch 1/3, step 1666  eval_loss: 1\.\d+", text)
    steps = [line for line in lines if re.match(r"  step \d+/5000 ", line)]
    assert steps[0].startswith("  step 1/5000")
    assert steps[-1].startswith("  step 5000/5000")
    assert len(steps) <= 13


def test_a_slow_run_in_a_pipe_gets_a_line_about_every_ten_seconds_and_fewer_later(fake_run):
    stream = io.StringIO()
    now = [0.0]
    console = Console(stream=stream, clock=lambda: now[0])
    console.handle(fake_run.start(["m"], 10**6))
    counts = []
    for step in range(1, 20_001):
        now[0] += 4.0
        console.handle(fake_run.step_record("m", step, 10**6, 4.0))
        if step in (75, 20_000):
            counts.append(stream.getvalue().count("  step "))
    console.close()
    assert 20 <= counts[0] <= 30  # 300 s
    assert counts[1] < 400  # 22 hours


def test_a_lost_loss_is_always_shown(fake_run):
    stream = io.StringIO()
    console = Console(stream=stream, clock=lambda: 0.0)
    console.handle(fake_run.start(["m"], 1000))
    for step in range(1, 20):
        record = fake_run.step_record("m", step, 1000, 0.0)
        console.handle(dataclasses.replace(record, loss=float("nan")) if step == 7 else record)
    console.close()
    assert "step 7/1000  epoch 0.02  loss nan" in stream.getvalue()


def test_the_log_level_hides_messages(fake_run):
    for level, expected in (("INFO", 2), ("WARNING", 1), ("ERROR", 0)):
        stream = io.StringIO()
        console = Console(stream=stream, log_level=level)
        console.handle(MessageRecord(level="info", text="said"))
        console.handle(MessageRecord(level="warning", text="said"))
        console.close()
        assert stream.getvalue().count("said") == expected


def test_text_that_the_terminal_cannot_encode_is_replaced(fake_run):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(stream=stream)
    console.handle(MessageRecord(level="info", text="größer \x1b]0;title\x07"))
    console.close()
    stream.flush()
    assert b"gr??er" in raw.getvalue().replace(b"\xc3", b"?")
    assert b"\x1b" not in raw.getvalue()


def test_a_closed_pipe_does_not_end_the_run(fake_run, caplog, capsys):
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = open(write_end, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - closing it fails, below
    listeners = Listeners(optional=[Console(stream=stream)])
    for step in (1, 2, 3):
        listeners.handle(fake_run.step_record("m", step, 3, 0.0))
    listeners.close()
    assert [r.message for r in caplog.records if "left out" in r.message] == [
        "Console stopped working and is left out from here on: BrokenPipeError: [Errno 32] Broken pipe"
    ]
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(OSError, match="Broken pipe"):
        stream.close()


@pytest.mark.parametrize("width", [40, 50, 60, 70, 80, 100, 140, 200])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_bars_fit_the_terminal(fake_run, width, count):
    console = rich.console.Console(
        file=io.StringIO(), width=width, height=12, force_terminal=True, color_system=None
    )
    names = fake_run.participant_names(count)
    progress = {name: Progress(name, 3) for name in names}
    for name in names:
        record = fake_run.step_record(name, 98_765, 100_000, 2.0)
        progress[name].update(record)
    with console.capture() as capture:
        console.print(ProgressBars(console, progress).render())
    lines = capture.get().splitlines()
    assert len(lines) == (count if count <= 8 else 8)
    for line in lines:
        assert cell_len(CONTROL.sub("", line)) <= width
        assert "…" not in line
    if count <= 8:
        assert all("loss" in line for line in lines)
    else:
        # The newest are shown.
        assert lines[-2].startswith(f"▶ {names[-1]}")
        assert "and 13 more" in lines[-1]


def run_in_terminal(
    arguments, *, columns=80, interrupt_at=None, signal_number=signal.SIGINT, **environment
) -> tuple[str, int]:
    """Output of a process on a terminal of its own, and its exit status."""
    parent, child = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(columns),
        "LINES": "30",
        "TERM": "xterm-256color",
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=child, stderr=child, stdin=child, env=environment
    )
    os.close(child)
    output = b""
    while select.select([parent], [], [], 60)[0]:
        chunk = b""
        # Linux says EIO, others the end of the file, when the process has closed the terminal.
        with contextlib.suppress(OSError):
            chunk = os.read(parent, 65536)
        if not chunk:
            break
        output += chunk
        if interrupt_at is not None and interrupt_at in output:
            process.send_signal(signal_number)
            interrupt_at = None
    os.close(parent)
    return output.decode("utf-8"), process.wait(timeout=60)


def test_on_a_terminal_nothing_wraps_and_the_bar_is_redrawn_in_place(fake_run_path, tmp_path):
    arguments = [fake_run_path, tmp_path / "run", "--steps", "60", "--participants", "2", "--report-to"]
    output, status = run_in_terminal([*arguments], columns=80)
    assert status == 0, output
    lines = [CONTROL.sub("", line).rstrip() for line in re.split(r"[\r\n]+", output)]
    # A path is never folded, so that it can be copied.
    assert max(cell_len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert any(line.startswith("  en-US 3/3 ━") for line in lines)
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_the_cursor_visible(fake_run_path, tmp_path, signal_number):
    arguments = [
        fake_run_path,
        tmp_path / "run",
        "--steps",
        "2000",
        "--seconds-per-step",
        "0.01",
        "--report-to",
    ]
    output, status = run_in_terminal(arguments, interrupt_at=b"Epoch 1/3", signal_number=signal_number)
    assert status != 0
    assert ("KeyboardInterrupt" in output) is (signal_number == signal.SIGINT)
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


def test_no_color_is_respected(fake_run_path, tmp_path):
    arguments = [fake_run_path, tmp_path / "run", "--steps", "20", "--report-to"]
    coloured, _ = run_in_terminal(arguments)
    plain, status = run_in_terminal([*arguments[:1], tmp_path / "other", *arguments[2:]], NO_COLOR="1")
    assert status == 0
    colour = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|38|9[0-7])\b[0-9;]*m")
    assert colour.search(coloured)
    assert not colour.search(plain)


def test_a_python_warning_is_one_line(fake_run):
    import logging

    stream = io.StringIO()
    logging.captureWarnings(True)
    console = Console(stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look here", UserWarning, stacklevel=1)
    console.close()
    logging.captureWarnings(False)
    assert re.fullmatch(r"warning: \S+:\d+: UserWarning: look here\n", stream.getvalue())


def test_one_line():
    assert one_line("a\n  b\x1b[31mc\t") == "a b [31mc"
    assert one_line("x" * 50, limit=10) == "x" * 9 + "…"


def test_time_left_is_that_of_the_steps_to_come(fake_run):
    progress = Progress("m", None)
    assert progress.seconds_left() is None
    # A resumed run begins at step 51; the 50 steps before took no time of this process.
    for step in (51, 52, 53):
        record: StepRecord = dataclasses.replace(fake_run.step_record("m", step, 100, 0.0), step_seconds=2.0)
        progress.update(record)
    assert progress.seconds_left() == 2.0 * 47
    assert progress.num_epochs == pytest.approx(3)
