"""Split one table into files: training and held-out rows, or one file a client."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import durable
from toolkit.data.check import digest
from toolkit.data.examples import Labelled
from toolkit.data.read import read_table
from toolkit.data.recognise import build_examples, guess_task, recognise
from toolkit.data.selection import only_locale
from toolkit.errors import DataError

SPLIT_FILE = re.compile(r"(train|valid|test|client_\d+)\.json")
NAMES_BY_COUNT = {2: ("train", "valid"), 3: ("train", "valid", "test")}


def shares_of(config: Any) -> dict[str, float]:
    """Name of each file -> its share of the rows.

    Args:
        config: SplitConfig.

    Raises:
        DataError: fractions that are not two or three positive numbers with the sum 1.
    """
    if config.clients is not None:
        share = (1 - config.valid_fraction) / config.clients
        shares = {f"client_{number}": share for number in range(config.clients)}
        return {**shares, "valid": config.valid_fraction} if config.valid_fraction else shares
    fractions = config.fractions
    if len(fractions) not in NAMES_BY_COUNT or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(
            f"--fractions {','.join(f'{f:g}' for f in fractions)}: two or three positive shares with the "
            "sum 1 are needed",
            hint="e.g. --fractions 0.8,0.1,0.1",
        )
    return dict(zip(NAMES_BY_COUNT[len(fractions)], fractions, strict=True))


def assign(
    digests: Sequence[bytes], strata: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, list[int]]:
    """Decide which row goes where.

    Args:
        digests: content of each row; rows of equal content stay together.
        strata: label of each row (any constant where there is none); every label is divided by the shares.
        shares: name of a part -> its share.
        seed: decides which rows.

    Returns:
        name of a part -> numbers of its rows, ascending. The same for the same input.
    """
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(digests):
        groups.setdefault(key, []).append(index)
    by_stratum: dict[str, list[list[int]]] = {}
    for rows in groups.values():
        by_stratum.setdefault(strata[rows[0]], []).append(rows)
    parts: dict[str, list[int]] = {name: [] for name in shares}
    generator = random.Random(seed)
    num_assigned = 0
    for stratum in sorted(by_stratum):
        order = by_stratum[stratum]
        generator.shuffle(order)
        sizes = dict.fromkeys(shares, 0)
        done = 0
        for rows in order:
            # The part that is furthest behind in this label, then the one furthest behind in all.
            done += len(rows)
            num_assigned += len(rows)
            behind = {
                name: (round(share * done - sizes[name], 9), share * num_assigned - len(parts[name]))
                for name, share in shares.items()
            }
            name = max(behind, key=lambda n: behind[n])
            sizes[name] += len(rows)
            parts[name] += rows
    return {name: sorted(rows) for name, rows in parts.items()}


def split_data(config: Any) -> dict[Path, int]:
    """Read the data, split it and write the files.

    Args:
        config: SplitConfig.

    Returns:
        path of each file -> number of its rows.

    Raises:
        DataError: a file exists (without overwrite), a part would be empty, or the data cannot be read.
    """
    shares = shares_of(config)
    paths = {name: config.out / f"{name}.json" for name in shares}
    existing = [str(path) for path in paths.values() if path.exists()]
    if existing and not config.overwrite:
        raise DataError(f"{', '.join(existing)} exist already", hint="give another --out, or --overwrite")
    foreign = [str(path) for path in _files_of_splits(config.out) if path not in paths.values()]
    if foreign:
        raise DataError(
            f"{config.out} holds files of another split: {', '.join(foreign)}",
            hint="delete them, or give another --out: files of two splits beside each other would mix rows",
        )
    table = read_table(config.data, split=config.train_split)
    if config.locale is not None:
        table = only_locale(table, config.locale)
    task = guess_task(table, config)
    layout = recognise(table, data_format=config.data_format, data_mapping=config.data_mapping, task=task)
    examples = build_examples(table, layout)
    strata = [example.label if isinstance(example, Labelled) else "" for example in examples]
    parts = assign([digest(example.key()) for example in examples], strata, shares, config.seed)
    empty = [name for name, rows in parts.items() if not rows]
    if empty:
        raise DataError(
            f"{table.source}: {len(table)} rows are too few, nothing is left for {', '.join(empty)}",
            hint="give fewer clients or other --fractions",
        )
    for name, rows in parts.items():
        durable.write_text(paths[name], as_json([table.rows[index] for index in rows]))
    return {paths[name]: len(rows) for name, rows in parts.items()}


def _files_of_splits(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if SPLIT_FILE.fullmatch(path.name)]


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A JSON array with one row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in rows)
    return f"[\n{lines}\n]\n"
