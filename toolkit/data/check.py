"""What the data is like, and whether training on it makes sense.

:class:`CheckReport` is plain numbers that go to JSON and back; :func:`judge` compares them with the
thresholds of DataOptions.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toolkit.data.examples import Example, Labelled

NUM_BINS = 16
MAX_IMBALANCE = 20
QUANTILES = {
    "min": 0.0,
    "p05": 0.05,
    "p25": 0.25,
    "p50": 0.5,
    "p75": 0.75,
    "p95": 0.95,
    "p99": 0.99,
    "max": 1.0,
}


@dataclass
class Lengths:
    """Distribution of the rows' lengths, before the overlong policy. ``unit``: "tokens" or "characters"."""

    unit: str
    quantiles: dict[str, int]
    mean: float
    bin_edges: list[int]
    bin_counts: list[int]

    @staticmethod
    def of(lengths: Sequence[int], unit: str) -> "Lengths":
        if not len(lengths):
            return Lengths(unit, dict.fromkeys(QUANTILES, 0), 0.0, [0, 1], [0])
        values = np.asarray(lengths, dtype=np.int64)
        quantiles = {
            n: int(v)
            for n, v in zip(
                QUANTILES, np.quantile(values, list(QUANTILES.values()), method="lower"), strict=True
            )
        }
        low, high = int(values.min()), int(values.max())
        width = max(1, -(-(high - low + 1) // NUM_BINS))
        edges = list(range(low, high + width + 1, width))
        counts, _ = np.histogram(values, bins=edges)
        return Lengths(unit, quantiles, round(float(values.mean()), 2), edges, [int(c) for c in counts])


@dataclass
class SplitReport:
    """One split. Rows are those of the source; sequences are what the model sees (before packing).

    num_trained_tokens are the targets of the loss. num_bos_missing counts sequences that do not begin with
    BOS although the tokenizer puts one at the beginning; num_eos_untrained those whose last trained token is
    neither EOS nor another special token.
    """

    name: str
    source: str
    num_rows: int
    lengths: Lengths
    num_sequences: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    longest: int = 0
    num_duplicate_rows: int = 0
    num_duplicate_answers: int = 0
    num_answers: int = 0
    num_conflicting_labels: int = 0
    label_counts: dict[str, int] = field(default_factory=dict)
    overlong: dict[str, Any] = field(default_factory=dict)
    rendering: dict[str, int] = field(default_factory=dict)
    encoding: dict[str, int] = field(default_factory=dict)
    num_bos_missing: int = 0
    num_eos_untrained: int = 0
    num_packed_sequences: int | None = None

    @property
    def trained_share(self) -> float:
        return self.num_trained_tokens / max(1, self.num_tokens)


@dataclass
class CheckReport:
    """Everything that the check found, for one pair of training and held-out data."""

    task: str
    data_format: str
    train: SplitReport
    evaluation: SplitReport | None = None
    num_leaked_rows: int = 0
    leaked_places: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    template_sha256: str | None = None
    turn_end: str | None = None
    eos_token: str | None = None
    label_names: list[str] | None = None
    unused_label: str | None = None
    fingerprint: str | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def leaked_share(self) -> float:
        return self.num_leaked_rows / max(1, self.evaluation.num_rows) if self.evaluation else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = dataclasses.asdict(self)
        for part in (value["train"], value["evaluation"]):
            if part:
                part["trained_share"] = round(part["num_trained_tokens"] / max(1, part["num_tokens"]), 6)
        return value

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "CheckReport":
        """The inverse of :meth:`as_dict`."""

        def split(part: dict[str, Any] | None) -> SplitReport | None:
            if part is None:
                return None
            fields = {k: v for k, v in part.items() if k != "trained_share"}
            return SplitReport(**{**fields, "lengths": Lengths(**part["lengths"])})

        train = split(value["train"])
        assert train is not None
        return CheckReport(**{**value, "train": train, "evaluation": split(value["evaluation"])})


def digest(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in case and white space only."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def describe_rows(report: SplitReport, examples: Sequence[Example]) -> list[bytes]:
    """Fill in what needs no tokenizer (duplicates, labels) and return the digest of each row."""
    digests = [digest(example.key()) for example in examples]
    report.num_duplicate_rows = len(digests) - len(set(digests))
    answers = [digest(answer) for example in examples for answer in example.answers()]
    report.num_answers = len(answers)
    report.num_duplicate_answers = len(answers) - len(set(answers))
    labels: dict[bytes, str] = {}
    counts: Counter[str] = Counter()
    for key, example in zip(digests, examples, strict=True):
        if isinstance(example, Labelled):
            counts[example.label] += 1
            report.num_conflicting_labels += labels.setdefault(key, example.label) != example.label
    report.label_counts = dict(sorted(counts.items()))
    return digests


def find_leaks(report: CheckReport, train: Sequence[bytes], evaluation: Sequence[bytes], where: Any) -> None:
    """Count the held-out rows that are in the training data too, and note the places of the first few."""
    known = set(train)
    leaked = [index for index, key in enumerate(evaluation) if key in known]
    report.num_leaked_rows = len(leaked)
    report.leaked_places = [where(index) for index in leaked[:5]]


def percent(share: float) -> str:
    """A share for people: 12.3 %, and never 0.0 % for something that is there."""
    value = share * 100
    return (
        "0 %"
        if value == 0
        else "< 0.01 %"
        if value < 0.01
        else f"{value:.2f} %"
        if value < 1
        else f"{value:.1f} %"
    )


def judge(report: CheckReport, config: Any) -> None:
    """Fill in ``problems`` (training should not start) and ``warnings`` from the numbers and the thresholds
    of ``config``.

    Args:
        report: complete numbers.
        config: has min_trainable_share, max_lost_rows, max_duplicates, max_leaks (DataOptions).
    """
    problems: list[str] = []
    train = report.train
    has_tokens = report.tokenizer is not None
    is_language_model = report.task == "causal-lm"
    if has_tokens and is_language_model and train.trained_share < config.min_trainable_share:
        problems.append(
            f"only {percent(train.trained_share)} of the training tokens are trained "
            f"(--min-trainable-share {config.min_trainable_share:g})"
        )
    for split in (train, report.evaluation):
        if split and config.overlong == "error" and split.overlong.get("num_rows_over"):
            place, length = split.overlong["worst"][0]
            problems.append(
                f"{split.name}: {split.overlong['num_rows_over']} rows are longer than --max-length "
                f"{split.overlong['max_length']}, and --overlong is error; the longest is {place} with "
                f"{length} tokens"
            )
            continue
        touched = (
            split.overlong.get("num_rows_dropped", 0) + split.overlong.get("num_rows_cut", 0) if split else 0
        )
        if split and touched / max(1, split.num_rows) > config.max_lost_rows:
            problems.append(
                f"{split.name}: --overlong {split.overlong['policy']} touches {touched} of "
                f"{split.num_rows} rows, "
                f"{percent(touched / split.num_rows)} (--max-lost-rows {config.max_lost_rows:g}, "
                f"--max-length {split.overlong['max_length']})"
            )
    if train.num_duplicate_rows / max(1, train.num_rows) > config.max_duplicates:
        problems.append(
            f"{train.num_duplicate_rows} of {train.num_rows} training rows repeat an earlier row, "
            f"{percent(train.num_duplicate_rows / train.num_rows)} (--max-duplicates "
            f"{config.max_duplicates:g})"
        )
    if report.leaked_share > config.max_leaks:
        assert report.evaluation is not None
        problems.append(
            f"{report.num_leaked_rows} of {report.evaluation.num_rows} held-out rows are in the training "
            "data too, "
            f"{percent(report.leaked_share)} (--max-leaks {config.max_leaks:g}): "
            f"{', '.join(report.leaked_places)}"
        )
    report.problems = problems
    stops = config.overlong == "error"
    report.warnings = [*_split_warnings(train, policy_stops=stops), *_token_warnings(report)]
    report.warnings += _label_warnings(report)
    if report.evaluation:
        report.warnings += _split_warnings(report.evaluation, policy_stops=stops)


def _label_warnings(report: CheckReport) -> list[str]:
    if not report.unused_label:
        return []
    return [
        f"the column {report.unused_label!r} is not used with --task {report.task}; --task "
        "sequence-classification trains a classifier on it"
    ]


def _split_warnings(split: SplitReport, *, policy_stops: bool) -> list[str]:
    rendering, overlong = split.rendering, split.overlong
    notes = {
        "empty answers, not trained": rendering.get("num_empty_answers", 0),
        "rows without anything to train, left out": rendering.get("num_rows_without_answer", 0),
        "turns with a row of their own (the template changes them once turns follow)": rendering.get(
            "num_turns_with_own_row", 0
        ),
        "rows with the text of a special token, which is read as that token": rendering.get(
            "num_rows_with_special_text", 0
        ),
        "rows that began with two BOS, of which one was taken out": split.encoding.get("num_double_bos", 0),
        "rows with a token that holds both prompt and answer, which is trained": split.encoding.get(
            "num_merged", 0
        ),
        "rows that repeat a text with another label": split.num_conflicting_labels,
        "sequences without BOS, which the tokenizer puts before plain text": split.num_bos_missing,
        "sequences in which no token that ends the answer is trained": split.num_eos_untrained,
    }
    found = [f"{split.name}: {text}: {number}" for text, number in notes.items() if number]
    if overlong.get("num_answer_tokens_lost") and not policy_stops:
        lost, total = overlong["num_answer_tokens_lost"], overlong["num_answer_tokens"]
        policy = f"--overlong {overlong['policy']}"
        found.append(f"{split.name}: {policy} loses {lost} of {total} answer tokens, {percent(lost / total)}")
    if split.label_counts and split.name == "train":
        rarest, commonest = min(split.label_counts.values()), max(split.label_counts.values())
        if commonest > MAX_IMBALANCE * rarest:
            found.append(f"train: the commonest label has {commonest} rows and the rarest {rarest}")
    return found


def _token_warnings(report: CheckReport) -> list[str]:
    found = []
    train = report.train
    if report.tokenizer is None or report.task != "causal-lm":
        return found
    if 0 < train.trained_share < 0.01:
        found.append(
            f"train: only {percent(train.trained_share)} of the tokens are trained; are the answers where "
            "they should be?"
        )
    if train.trained_share > 0.95 and report.data_format != "text":
        found.append(
            f"train: {percent(train.trained_share)} of the tokens are trained; is the prompt part of the "
            "answers?"
        )
    if train.rendering.get("num_open_ends"):
        found.append(
            f"the chat template does not end an answer with a special token; EOS {report.eos_token!r} is "
            "appended"
        )
    if report.turn_end and report.eos_token and report.turn_end != report.eos_token:
        found.append(
            f"an answer ends with {report.turn_end!r}, and the tokenizer's EOS is {report.eos_token!r}: "
            "generation has to stop at both"
        )
    if report.eos_token is None:
        found.append("the tokenizer has no EOS: the model cannot learn to stop")
    return found
