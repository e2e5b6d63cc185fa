"""What a terminal shows of rounds: merges, alerts and the comparison as styled lines, and a line for the whole run."""

import re
from collections.abc import Callable, Mapping

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from toolkit.reporting import round_wording, wording
from toolkit.reporting.progress import Progress, seconds_left_of_all
from toolkit.reporting.records import AlertRecord, ComparisonRecord, MergeRecord, RoundRecord

RoundEvent = MergeRecord | RoundRecord | AlertRecord
BREAK = re.compile(r" (\[.*|[^ ]+)$")
VERDICT_STYLES = {"helped": "green", "hurt": "red", "no difference": "dim"}
GATE_STYLES = {"accepted": "green", "rejected": "yellow"}
MERGE_STYLES = {"merged": "bold magenta", "skipped": "dim", "failed": "bold red"}


class RoundView:
    """Keeps what the terminal says of the rounds so far.

    Args:
        progress: participant to progress; its metrics and states are kept up to date.
        clock: seconds, rising.
    """

    def __init__(self, progress: Mapping[str, Progress], clock: Callable[[], float]) -> None:
        self._progress = progress
        self._clock = clock
        self._began: float | None = None
        self._last_round: RoundRecord | None = None
        self._num_merges = 0
        self._num_alerts = 0
        self._departed: set[str] = set()

    def begin(self) -> None:
        """The first step is being made."""
        if self._began is None:
            self._began = self._clock()

    def lines(self, record: RoundEvent) -> list[Text]:
        """What to print of a record, after it has been taken into account."""
        if isinstance(record, MergeRecord):
            return self._merge(record)
        if isinstance(record, RoundRecord):
            return self._round(record)
        self._num_alerts += 1
        return [Text(f"  {round_wording.alert_line(record)}", style="bold red")]

    def footer(self) -> str:
        """``all  epoch 3/15, 2 merges, 1 alert, about 12:34 left``."""
        if len(self._progress) < 2 or self._began is None:
            return ""
        parts = []
        if self._last_round is not None:
            parts.append(f"epoch {self._last_round.epoch}/{self._last_round.num_epochs} done")
        for count, word in ((self._num_merges, "merge"), (self._num_alerts, "alert")):
            if count:
                parts.append(f"{count} {word}{'s' if count > 1 else ''}")
        seconds = seconds_left_of_all(list(self._progress.values()), self._clock() - self._began)
        if seconds:
            parts.append(f"about {wording.duration(seconds)} left")
        return f"all  {', '.join(parts)}"

    def _merge(self, record: MergeRecord) -> list[Text]:
        self._num_merges += record.status == "merged"
        for name, verdict in record.gate.items():
            if verdict != "rejected" and name in self._progress:
                self._progress[name].show_metrics(record.after.get(name, {}))
        title, *details = round_wording.merge_lines(record)
        return [
            Text(f"  {title}", style=MERGE_STYLES[record.status]),
            *(_highlighted(f"    {line}", GATE_STYLES) for line in details),
        ]

    def _round(self, record: RoundRecord) -> list[Text]:
        self._last_round = record
        for status, names in (("stopped early", record.stopped), ("failed", record.failed)):
            for name in names:
                if name in self._progress:
                    self._progress[name].status = status
        departures = round_wording.departures(record, self._departed)
        self._departed |= {name for name, _ in departures}
        title, *details = round_wording.round_lines(record)
        return [
            Text(f"  {title}", style="bold"),
            *(Text(f"    {line}", style="dim") for line in details),
            *(Text(f"    {name} {why}", style="yellow") for name, why in departures),
        ]


def comparison_table(record: ComparisonRecord, width: int) -> Table:
    """The comparison in ``width`` columns: where they are few, every cell breaks before its last word or bracket."""
    natural = sum(max(map(cell_len, column)) + 2 for column in zip(record.columns, *record.rows, strict=True))
    is_narrow = natural > width
    table = Table(box=None, padding=(0, 1 if is_narrow else 2, 0, 0), pad_edge=False, header_style="cyan")
    for column in record.columns:
        table.add_column(column.replace(" ", "\n") if is_narrow else column)
    for row in record.rows:
        *cells, verdict = row
        if is_narrow:
            cells = [BREAK.sub(r"\n\1", cell) for cell in cells]
        table.add_row(*map(Text, cells), Text(verdict, style=VERDICT_STYLES.get(verdict, "")))
    return table


def _highlighted(line: str, styles: Mapping[str, str]) -> Text:
    text = Text(line)
    for word, style in styles.items():
        text.highlight_words([f" {word}"], style)
    return text
