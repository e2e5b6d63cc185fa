"""From the data options to rows that a trainer takes: the one entry that training uses."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from toolkit.data import cache
from toolkit.data.check import CheckReport, Lengths, SplitReport, describe_rows, find_leaks, judge
from toolkit.data.classify import classify, label_names_of
from toolkit.data.columns import classification_dataset, language_model_dataset
from toolkit.data.examples import Example, Labelled
from toolkit.data.identity import rows_sha256
from toolkit.data.language import encode_examples, turn_end_of
from toolkit.data.overlong import overlong_facts
from toolkit.data.read import Table
from toolkit.data.recognise import Layout, build_examples, recognise, unused_label
from toolkit.data.selection import hold_out, select_tables
from toolkit.errors import DataError

NUM_ROWS_WITH_PROGRESS = 20_000


@dataclass(frozen=True)
class Prepared:
    """Data that is ready for a trainer.

    Args:
        train: ``datasets.Dataset`` with input_ids and labels (lists of int, -100 where not trained; for
            classification the class number) and length; packed rows also position_ids and seq_lengths.
        evaluation: the held-out rows in the same form, never packed; None where there are none.
        label_names: the classes in order of their numbers, for sequence classification.
        report: what the check found.
        fingerprint: SHA-256 of the rows of tokens and labels (:func:`~toolkit.data.identity.rows_sha256`).
        longest: length in tokens of the longest row, of either split, before packing.
    """

    train: Any
    evaluation: Any | None
    label_names: list[str] | None
    report: CheckReport
    fingerprint: str
    longest: int


@dataclass
class _Split:
    table: Table
    examples: Sequence[Example]
    report: SplitReport

    @property
    def where(self) -> Any:
        return self.table.where


def prepare(
    config: Any,
    tokenizer: Any,
    task: str,
    *,
    seed: int,
    enforce: bool = True,
    use_cache: bool = True,
    label_names: Sequence[str] | None = None,
) -> Prepared:
    """Read, check, render, tokenise and (with ``packing``) pack the data of ``config``.

    Args:
        config: has the fields of DataOptions.
        tokenizer: a transformers tokenizer, with the chat template that inference uses too.
        task: "causal-lm" or "sequence-classification".
        seed: decides which rows ``eval_fraction`` holds out.
        enforce: raise when the check finds problems, unless ``config.skip_data_check``. Without, rows that
            are too long under --overlong error are left out and become a problem of the report.
        use_cache: look in the tokenised cache, and write into it.
        label_names: the classes, where several participants share one classifier (:func:`shared_label_names`).
            None: those of the training rows.

    Raises:
        DataError: wrong data (message with file and row), no row left, or problems that the check found.
        ModelError: chat data and a tokenizer without chat template.
    """
    asked = config
    if not enforce and config.overlong == "error":
        # A report of everything that is wrong says more than an error about the first thing.
        config = config.model_copy(update={"overlong": "drop"})
    train_table, evaluation_table = select_tables(config)
    layout = _layout(train_table, config, task)
    key = _cache_key(config, tokenizer, task, seed, layout, train_table, evaluation_table, label_names)
    folder = cache.cache_folder(config.data_cache)
    entry = cache.find(folder, key) if use_cache else None
    if entry is not None:
        prepared = _load(entry)
    else:
        prepared = _build(config, tokenizer, task, seed, layout, train_table, evaluation_table, label_names)
        if use_cache:
            prepared = _store(folder, key, prepared)
    judge(prepared.report, asked)
    if enforce and prepared.report.problems and not config.skip_data_check:
        lines = "\n".join(f"  - {problem}" for problem in prepared.report.problems)
        raise DataError(
            f"the data check found problems:\n{lines}",
            hint="meldkit data check shows the details; --skip-data-check starts all the same",
        )
    return prepared


def _layout(table: Table, config: Any, task: str) -> Layout:
    return recognise(table, data_format=config.data_format, data_mapping=config.data_mapping, task=task)


def shared_label_names(configs: Iterable[Any]) -> list[str]:
    """The classes of one classifier that several participants train: those of all training rows that their data has,
    whatever ``max_rows`` leaves of them.

    Args:
        configs: the data options of each participant.

    Raises:
        DataError: wrong data, or fewer than two classes in all.
    """
    examples: dict[str, Labelled] = {}
    for config in configs:
        table, _ = select_tables(config.model_copy(update={"max_rows": None}))
        rows = build_examples(table, _layout(table, config, "sequence-classification"))
        examples |= {example.label: example for example in cast("Sequence[Labelled]", rows)}
    return label_names_of(list(examples.values()))


def _cache_key(
    config: Any,
    tokenizer: Any,
    task: str,
    seed: int,
    layout: Layout,
    train: Table,
    evaluation: Table | None,
    label_names: Sequence[str] | None,
) -> str:
    facts = {
        "tokenizer": cache.tokenizer_facts(tokenizer),
        "task": task,
        "format": [layout.format.name, dict(layout.columns)],
        "options": {
            n: getattr(config, n) for n in ("max_length", "overlong", "loss_on", "packing", "data_mapping")
        },
        "held_out": None
        if evaluation is not None
        else [config.eval_fraction, seed if config.eval_fraction else 0],
        "label_names": None if label_names is None else list(label_names),
    }
    tables = [table for table in (train, evaluation) if table is not None]
    # The report names the files, which are part of the key therefore.
    return cache.entry_key([table.rows for table in tables], facts, [table.source for table in tables])


def split_examples(
    config: Any, task: str, seed: int, layout: Layout, train_table: Table, evaluation_table: Table | None
) -> tuple[_Split, _Split | None, CheckReport]:
    """Rows as examples, held-out rows chosen, and a report of what needs no tokenizer."""
    train = _split("train", train_table, build_examples(train_table, layout))
    evaluation = None
    digests = describe_rows(train.report, train.examples)
    if evaluation_table is not None:
        examples = build_examples(evaluation_table, _layout(evaluation_table, config, task))
        evaluation = _split("held-out", evaluation_table, examples)
    elif config.eval_fraction:
        kept, held_out = hold_out(digests, config.eval_fraction, seed)
        examples = train.examples
        train = _split("train", train_table.select(kept), [examples[n] for n in kept])
        evaluation = _split("held-out", train_table.select(held_out), [examples[n] for n in held_out])
        digests = describe_rows(train.report, train.examples)
    report = CheckReport(task, layout.format.name, train.report)
    report.unused_label = unused_label(train_table, layout)
    report.notes += [note for table in (train_table, evaluation_table) if table for note in table.notes]
    if evaluation is not None:
        held_out_digests = describe_rows(evaluation.report, evaluation.examples)
        report.evaluation = evaluation.report
        find_leaks(report, digests, held_out_digests, evaluation.where)
    return train, evaluation, report


def _split(name: str, table: Table, examples: Sequence[Example]) -> _Split:
    lengths = Lengths.of([len(example.key()) for example in examples], "characters")
    return _Split(table, examples, SplitReport(name, table.source, len(examples), lengths))


def _build(
    config: Any,
    tokenizer: Any,
    task: str,
    seed: int,
    layout: Layout,
    train_table: Table,
    evaluation_table: Table | None,
    label_names: Sequence[str] | None,
) -> Prepared:
    train, evaluation, report = split_examples(config, task, seed, layout, train_table, evaluation_table)
    report.tokenizer = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    report.template_sha256 = cache.template_sha256(tokenizer)
    report.eos_token = tokenizer.eos_token
    if task == "sequence-classification":
        names = label_names or label_names_of(cast("Sequence[Labelled]", train.examples))
        report.label_names = list(names)
        train_rows, evaluation_rows = _classification_rows(config, tokenizer, train, evaluation, report)
    else:
        train_rows, evaluation_rows = _language_rows(config, tokenizer, train, evaluation, report)
    fingerprint = report.fingerprint = rows_sha256(train_rows, evaluation_rows)
    longest = max(part.longest for part in (report.train, report.evaluation) if part)
    return Prepared(train_rows, evaluation_rows, report.label_names, report, fingerprint, longest)


def _language_rows(
    config: Any, tokenizer: Any, train: _Split, evaluation: _Split | None, report: CheckReport
) -> Any:
    def encode(split: _Split) -> list:
        rows = encode_examples(
            split.examples,
            tokenizer,
            split.report,
            loss_on=config.loss_on,
            max_length=config.max_length,
            overlong=config.overlong,
            where=split.where,
            progress=lambda batches: _progress(
                batches, f"Tokenising {split.report.name}", len(split.examples)
            ),
        )
        _require_rows(split.report, len(rows))
        return rows

    rows = encode(train)
    report.turn_end = turn_end_of(rows, train.examples, tokenizer)
    pack_length = config.max_length if config.packing else None
    dataset = language_model_dataset(rows, pack_length=pack_length, has_positions=config.packing)
    if config.packing:
        train.report.num_packed_sequences = len(dataset)
    if evaluation is None:
        return dataset, None
    return dataset, language_model_dataset(encode(evaluation), pack_length=None, has_positions=config.packing)


def _classification_rows(
    config: Any, tokenizer: Any, train: _Split, evaluation: _Split | None, report: CheckReport
) -> Any:
    if config.packing:
        raise DataError("--packing is for language models: a packed sequence has no single class")

    def encode(split: _Split) -> Any:
        rows, lengths, counts = classify(
            cast("Sequence[Labelled]", split.examples),
            report.label_names or [],
            tokenizer,
            policy=config.overlong,
            max_length=config.max_length,
            where=split.where,
        )
        split.report.lengths = Lengths.of(lengths, "tokens")
        split.report.overlong = overlong_facts(counts, split.where)
        split.report.num_sequences = len(rows)
        split.report.num_tokens = sum(len(row) for row in rows)
        split.report.longest = max((len(row) for row in rows), default=0)
        _require_rows(split.report, len(rows))
        return classification_dataset(rows)

    return encode(train), encode(evaluation) if evaluation is not None else None


def _require_rows(report: SplitReport, num_rows: int) -> None:
    if num_rows:
        return
    reasons = []
    if report.overlong.get("num_rows_dropped"):
        reasons.append(
            f"{report.overlong['num_rows_dropped']} are longer than --max-length "
            f"{report.overlong['max_length']}"
        )
    if report.rendering.get("num_rows_without_answer"):
        reasons.append(f"{report.rendering['num_rows_without_answer']} have no answer to train")
    raise DataError(
        f"{report.source}: none of the {report.num_rows} {report.name} rows is left: "
        f"{' and '.join(reasons) or 'none is trainable'}",
        hint="raise --max-length, choose another --overlong or --loss-on, or look at the rows with meldkit "
        "data preview",
    )


def _progress(batches: Iterable[int], description: str, num_rows: int) -> Iterable[int]:
    """A progress bar on a terminal for long work, on the first process only."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if num_rows < NUM_ROWS_WITH_PROGRESS or not is_first or not sys.stderr.isatty():
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(list(batches), description=description, console=Console(stderr=True), transient=True)


def _store(folder: Path, key: str, prepared: Prepared) -> Prepared:
    parts = {"train": prepared.train}
    if prepared.evaluation is not None:
        parts["evaluation"] = prepared.evaluation
    facts = {
        "report": prepared.report.as_dict(),
        "longest": prepared.longest,
        "fingerprint": prepared.fingerprint,
    }
    try:
        return _load(cache.store(folder, key, parts, facts))
    except OSError as error:
        # A cache saves time only; the rows are here, and training goes on without it.
        prepared.report.notes.append(f"the tokenised cache {folder} cannot be written ({error})")
        return prepared


def _load(entry: cache.Entry) -> Prepared:
    report = CheckReport.from_dict(entry.facts["report"])
    train, evaluation = cache.load(entry, "train"), cache.load(entry, "evaluation")
    return Prepared(
        train,
        evaluation,
        report.label_names,
        report,
        entry.facts["fingerprint"],
        entry.facts["longest"],
    )
