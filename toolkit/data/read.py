"""Data from anywhere: a file, a folder of files, a data set saved with ``datasets``, or a hub id."""

import dataclasses
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config.names import did_you_mean, nearest
from toolkit.data.files import EVALUATION_SPLITS, SPLIT_NAMES, SUFFIXES, Table, make_table, read_file
from toolkit.data.hub import load_from_hub
from toolkit.data.locale_codes import is_locale
from toolkit.data.samples.catalog import sample_folder
from toolkit.errors import DataError
from toolkit.paths import can_only_be_a_path

HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(:(?P<configuration>[\w.+-]+))?")

__all__ = ["EVALUATION_SPLITS", "Source", "Table", "open_source", "read_table"]


@dataclass(frozen=True)
class Source:
    """A source whose splits are known and read one by one.

    Args:
        name: what the user gave.
        splits: split name -> function that reads it. A single unnamed table has the name "train".
        is_named: False for a single file that names no split.
    """

    name: str
    splits: Mapping[str, Callable[[], Table]]
    is_named: bool

    def table(self, split: str) -> Table:
        """Read one split.

        Raises:
            DataError: no such split, or the file cannot be read.
        """
        if split not in self.splits:
            raise DataError(
                f"{self.name} has no split named {split!r}{did_you_mean(split, self.splits)}",
                hint=f"splits: {', '.join(self.splits)}",
            )
        return self.splits[split]()


def read_table(source: str, *, split: str | None = None) -> Table:
    """Read one split of ``source`` ("train" when it is not named).

    Args:
        source: file, folder, saved data set or hub id, with ``:configuration`` where the hub's data set has
            several.
        split: name of the split.

    Raises:
        DataError: the source is missing, broken or has no such split.
    """
    opened = open_source(source)
    return opened.table(split or ("train" if "train" in opened.splits else next(iter(opened.splits))))


def open_source(source: str) -> Source:
    """Find out what ``source`` is and which splits it has. Files are read only when a split is asked for.

    Raises:
        DataError: nothing of that name here or on the hub, or a folder without data.
        InputError: ``sample:NAME`` with an unknown name.
    """
    path = sample_folder(source) or Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved_dataset(path)
        return _folder(path)
    if path.is_file():
        return _single_file(path)
    # A hub id has at most one slash and no file's ending; a name in a folder that exists was meant as a
    # path.
    hub_id = HUB_ID.fullmatch(source)
    is_free = "/" not in source or not path.parent.is_dir()
    if hub_id and is_free and not can_only_be_a_path(hub_id["name"]):
        return _hub(hub_id["name"], hub_id["configuration"])
    raise _missing(path)


def _missing(path: Path) -> DataError:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if folder != path.parent:
        return DataError(
            f"{path} does not exist: there is no folder {path.parent}", hint="give the path of a data file"
        )
    near = nearest(path.name, names)
    return DataError(
        f"{path} does not exist", hint=f"did you mean {folder / near}?" if near else f"look in {folder}"
    )


def _single_file(path: Path) -> Source:
    tables = read_file(path)
    if set(tables) == {""}:
        return Source(str(path), {"train": lambda: tables[""]}, is_named=False)
    return Source(
        str(path), {name: (lambda table=table: table) for name, table in tables.items()}, is_named=True
    )


def _split_of(path: Path) -> str | None:
    """The split that a file name says: train.json, validation-00000-of-00002.parquet, my.test.csv."""
    for part in re.split(r"[._-]", path.stem.lower()):
        if part in SPLIT_NAMES:
            return part
    return None


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )


def _folder(folder: Path) -> Source:
    """A folder's own files; where none is named after a split those of ``data/``, as in a copy of a hub data
    set, or of a folder a locale."""
    own = _data_files(folder)
    groups = _by_split(own)
    if not groups and (folder / "data").is_dir():
        below = _data_files(folder / "data")
        groups, own = _by_split(below), [*own, *below]
    if not groups:
        by_locale = {path.name: _by_split(_data_files(path)) for path in _sub_folders(folder)}
        by_locale = {name: found for name, found in by_locale.items() if found and is_locale(name)}
        if by_locale:
            return _locales(folder, by_locale)
        if len(own) == 1:
            return _single_file(own[0])
        raise _no_splits(folder, own)
    return Source(
        str(folder),
        {
            name: (lambda name=name: _join(folder, name, [(path, None) for path in groups[name]]))
            for name in _ordered(groups)
        },
        is_named=True,
    )


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in files:
        split = _split_of(path)
        if split:
            groups.setdefault(split, []).append(path)
    return groups


def _ordered(splits: Collection[str]) -> list[str]:
    return [name for name in SPLIT_NAMES if name in splits]


def _no_splits(folder: Path, files: Sequence[Path]) -> DataError:
    found = ", ".join(path.name for path in files[:8]) or "no data files"
    below = [f"{path.name}/" for path in _sub_folders(folder)]
    if below:
        found += f"; not looked into, as it is no locale's name: {', '.join(below[:8])}"
    return DataError(
        f"{folder}: no file is named after a split ({found})",
        hint="name them train.jsonl, validation.jsonl, test.jsonl (or .json, .csv, .parquet), or give one "
        "file; a folder a locale is named like en-US/ and holds such files",
    )


def _locales(folder: Path, by_locale: Mapping[str, Mapping[str, list[Path]]]) -> Source:
    splits = {name: _ordered(groups) for name, groups in by_locale.items()}
    first = next(iter(splits))
    for name, found in splits.items():
        if found != splits[first]:
            raise DataError(
                f"{folder}: the folders of the locales do not have the same splits: {first} has "
                f"{', '.join(splits[first])}, and {name} has {', '.join(found)}",
                hint="add the files that are missing, or give the folder of one locale",
            )

    def read(split: str) -> Table:
        files = [(path, name) for name, groups in by_locale.items() for path in groups[split]]
        note = f"{folder} [{split}] joins the locales {', '.join(by_locale)}"
        return dataclasses.replace(_join(folder, split, files), notes=(note,))

    return Source(
        str(folder), {split: (lambda split=split: read(split)) for split in splits[first]}, is_named=True
    )


def _join(folder: Path, split: str, files: Sequence[tuple[Path, str | None]]) -> Table:
    tables = []
    for path, locale in files:
        found = read_file(path)
        table = found[""] if "" in found else found.get(split) or next(iter(found.values()))
        if locale and "locale" not in table.columns:
            rows = [{**row, "locale": locale} for row in table.rows]
            table = Table(table.source, rows, (*table.columns, "locale"), table.places, table.unit)
        tables.append(table)
    if len(tables) == 1:
        return tables[0]
    return _Joined.of(f"{folder} [{split}]", tables)


@dataclass(frozen=True)
class _Joined(Table):
    """Several files one after another; a row knows the file that it is from."""

    origins: tuple[str, ...] = ()

    @staticmethod
    def of(source: str, tables: list[Table]) -> "_Joined":
        rows = [dict(row) for table in tables for row in table.rows]
        origins = tuple(table.where(index) for table in tables for index in range(len(table)))
        checked = make_table(source, rows, range(1, len(rows) + 1), "row")
        return _Joined(source, rows, checked.columns, checked.places, "row", origins=origins)

    def where(self, index: int) -> str:
        return self.origins[self.places[index] - 1]

    def select(self, indices: Any) -> "_Joined":
        part = super().select(indices)
        return _Joined(
            self.source, part.rows, self.columns, part.places, self.unit, self.notes, origins=self.origins
        )


def _saved_dataset(folder: Path) -> Source:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder} is a damaged saved data set ({error})") from error
    return _from_datasets(str(folder), loaded)


def _hub(name: str, configuration: str | None) -> Source:
    import datasets.config
    import huggingface_hub

    endpoint = huggingface_hub.constants.ENDPOINT
    is_cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    if not is_cached and not can_reach(endpoint):
        raise DataError(
            f"{name} is neither a file or folder here nor in the cache, and {endpoint} cannot be reached",
            hint="check the spelling; without a network give a local file or folder",
        )
    try:
        loaded = load_from_hub(name, configuration)
    except Exception as error:  # the hub client raises a dozen classes of its own, requests' and httpx's
        kind, lines = type(error).__name__, str(error).splitlines() or ["no message"]
        hint = "check the spelling; without a network give a local file or folder"
        if "Config name is missing" in lines[0] or "BuilderConfig" in lines[0]:
            hint = f"this data set has configurations: give one as {name}:CONFIGURATION"
        raise DataError(
            f"{name} is neither a file or folder here nor a data set that could be loaded from the hub "
            f"({kind}: {lines[0][:160]})",
            hint=hint,
        ) from error
    return _from_datasets(f"{name}:{configuration}" if configuration else name, loaded)


def can_reach(url: str) -> bool:
    """Whether the host of ``url`` has an address, or a proxy may know it.

    Asked first, since the hub's client tries for half a minute to reach a host that does not exist.
    """
    host = urllib.parse.urlsplit(url).hostname
    if host is None or urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _from_datasets(name: str, loaded: Any) -> Source:
    import datasets

    def reader(split: str, data: Any) -> Callable[[], Table]:
        def read() -> Table:
            labels = {c: f for c, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
            rows = data.to_list()
            for column, feature in labels.items():
                for row in rows:
                    if row[column] is not None:
                        row[column] = feature.int2str(row[column])
            return make_table(f"{name} [{split}]", rows, range(1, len(rows) + 1), "row")

        return read

    if isinstance(loaded, datasets.Dataset):
        return Source(name, {"train": reader("train", loaded)}, is_named=False)
    return Source(name, {str(s): reader(str(s), d) for s, d in loaded.items()}, is_named=True)
