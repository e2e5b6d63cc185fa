"""Which rows are training rows and which are held out."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from toolkit.data.read import EVALUATION_SPLITS, Source, Table, open_source
from toolkit.errors import DataError


def select_tables(config: Any) -> tuple[Table, Table | None]:
    """Read the training rows, and the held-out rows where the data has some.

    Held out is, in this order: ``eval_data``; the split named ``eval_split``; a split named validation,
    valid, eval, dev or test. Otherwise None, and ``eval_fraction`` applies (:func:`hold_out`).

    Args:
        config: DataOptions.

    Raises:
        DataError: a source or split is missing, or no row has the locale.
    """
    source = open_source(config.data)
    if not source.is_named and config.train_split != "train":
        raise DataError(
            f"{source.name} has no named splits, and --train-split asks for {config.train_split!r}"
        )
    train = source.table(config.train_split)
    evaluation = _evaluation_table(config, source)
    if config.locale is not None:
        train = only_locale(train, config.locale)
        evaluation = only_locale(evaluation, config.locale) if evaluation is not None else None
    if config.max_rows is not None and config.max_rows < len(train):
        train = train.select(range(config.max_rows))
    return train, evaluation


def _evaluation_table(config: Any, source: Source) -> Table | None:
    if config.eval_data is not None:
        held_out = open_source(config.eval_data)
        if config.eval_split is not None:
            return held_out.table(config.eval_split)
        names = [name for name in EVALUATION_SPLITS if name in held_out.splits]
        return held_out.table(names[0] if names else next(iter(held_out.splits)))
    if config.eval_split is not None:
        return source.table(config.eval_split)
    for name in EVALUATION_SPLITS:
        if name in source.splits and name != config.train_split:
            return source.table(name)
    return None


def only_locale(table: Table, locale: str) -> Table:
    """The rows of one locale; en-US and en_us are the same."""
    if "locale" not in table.columns:
        raise DataError(
            f"{table.source} has no column named locale, and only rows of {locale} are asked for",
            hint=f"columns: {', '.join(table.columns)}",
        )

    def plain(value: Any) -> str:
        return str(value).replace("_", "-").casefold()

    wanted = plain(locale)
    chosen = [index for index, row in enumerate(table.rows) if plain(row.get("locale")) == wanted]
    if not chosen:
        present = sorted({str(row.get("locale")) for row in table.rows})
        more = f", ... ({len(present)} in all)" if len(present) > 20 else ""
        raise DataError(
            f"{table.source} has no rows of the locale {locale}",
            hint=f"locales: {', '.join(present[:20])}{more}",
        )
    # What is noted about a join of locales no longer holds for one of them.
    return dataclasses.replace(table.select(chosen), notes=())


def hold_out(digests: Sequence[bytes], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Choose held-out rows by seed; rows of equal content stay together, so that none leaks.

    Args:
        digests: content of each row (:func:`toolkit.data.check.digest`).
        fraction: share of the rows that is held out; at least one row is.
        seed: decides which.

    Returns:
        (numbers of the training rows, numbers of the held-out rows), each ascending.

    Raises:
        DataError: fewer than two different rows.
    """
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(digests):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"--eval-fraction {fraction:g} needs at least two different rows; the data has {len(groups)}"
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = max(1, round(fraction * len(digests)))
    chosen: list[int] = []
    for rows in order[:-1]:
        if len(chosen) >= wanted:
            break
        if not chosen or len(chosen) + len(rows) <= wanted:
            chosen += rows
    held_out = set(chosen)
    return [index for index in range(len(digests)) if index not in held_out], sorted(chosen)
