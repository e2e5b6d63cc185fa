"""The options of ``meldkit data check``, ``preview`` and ``split``."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from toolkit.config.options import Options, PreparationOptions, RowOptions


class TokenizerOptions(Options):
    """Tokenizer"""

    model: str | None = None
    """The model that will be trained: its tokenizer and chat template are used."""

    tokenizer: str | None = None
    """Tokenizer, when it is not the model's own: a hub id or a folder."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    chat_template: Path | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""

    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer. Off unless you have read that code."""

    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What will be trained: a language model, or a classifier of whole texts."""

    seed: int = Field(42, ge=0)
    """Seed of --eval-fraction."""


class DataCheckConfig(TokenizerOptions, RowOptions, PreparationOptions):
    """Look for what would spoil a training: empty or cut answers, duplicates, leaks between splits.

    Without --model or --tokenizer only rows and characters are looked at. Exit status 2 when there are
    problems.
    """

    output: Literal["text", "json"] = "text"
    """text: tables. json: the whole report for programs; --json is short for it."""


class PreviewConfig(TokenizerOptions, RowOptions):
    """Print rows as the model sees them: trained tokens in colour (without colours: in brackets), special
    tokens visible. Needs --model or --tokenizer."""

    num_rows: int = Field(3, ge=1)
    """Rows to print."""

    first_row: int = Field(1, ge=1)
    """Number of the first row."""

    show: Literal["train", "held-out"] = "train"
    """Which rows."""


class SplitConfig(Options):
    """Split data into train.json, valid.json and test.json, or among clients into client_0.json,
    client_1.json, ... and valid.json. Stratified by label where there is one; equal rows never part; the same
    for the same seed."""

    data: str
    """The rows: a .json, .jsonl, .csv or .parquet file, a folder of such files or saved with datasets, or a
    hub id."""

    out: Path
    """Folder for the files."""

    fractions: list[float] = Field(default_factory=lambda: [0.8, 0.1, 0.1])
    """Shares of train.json, valid.json and (when there is a third) test.json. They add up to 1."""

    clients: int | None = Field(None, ge=1)
    """Number of clients; every client gets the same share of what --valid-fraction leaves."""

    valid_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of valid.json beside the clients."""

    train_split: str = "train"
    """Name of the split that is read, where the data has splits."""

    locale: str | None = None
    """Only the rows of this locale, where the data has a column named locale."""

    data_format: str = "auto"
    """Format of the rows, by name (meldkit data formats lists them). auto: recognised by the columns."""

    data_mapping: dict[str, str] = Field(default_factory=dict)
    """Columns under other names: FIELD=COLUMN, e.g. prompt=question,completion=answer."""

    seed: int = Field(42, ge=0)
    """Decides which row goes where."""

    overwrite: bool = False
    """Replace files of an earlier split."""
