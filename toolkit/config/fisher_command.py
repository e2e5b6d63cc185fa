"""The options of ``meldkit fisher``."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from toolkit.config.options import LossTarget, Options, OverlongPolicy


class FisherOptions(Options):
    """Options"""

    model: str
    """The model, or the base of --adapter: a hub id or a folder in the Hugging Face layout."""

    adapter: Path | None = None
    """Folder of a LoRA adapter; its parameters are estimated then, not the base's."""

    data: str
    """The rows: a .json, .jsonl, .csv or .parquet file, a folder of such files or saved with datasets, or a
    hub id."""

    kind: Literal["empirical", "true"] = "empirical"
    """empirical: the labels of the data. true: the model's own distribution, exactly for at most 8 classes,
    else by drawing labels from it."""

    num_examples: int | None = Field(200, ge=1)
    """Rows to use, drawn by --seed; none: all."""

    batch_size: int = Field(8, ge=1)
    """Rows that go through the model together. The result does not depend on it."""

    seed: int = Field(42, ge=0)
    """Decides which rows are drawn, and which labels with --kind true."""

    task: Literal["auto", "causal-lm", "sequence-classification"] = "auto"
    """auto: what the model's or the adapter's configuration says."""

    max_length: int = Field(512, ge=8)
    """Longest sequence in tokens."""

    overlong: OverlongPolicy = "truncate"
    """Rows over --max-length: leave them out, cut their end, cut a conversation between turns, or stop."""

    loss_on: LossTarget = "assistant"
    """Tokens of a conversation whose likelihood counts: every assistant turn, the last one, the completion, or
    all."""

    train_split: str = "train"
    """Name of the split that is read, where the data has splits."""

    data_format: str = "auto"
    """Format of the rows, by name (meldkit data formats lists them). auto: recognised by the columns."""

    data_mapping: dict[str, str] = Field(default_factory=dict)
    """Columns under other names: FIELD=COLUMN, e.g. prompt=question,completion=answer."""

    locale: str | None = None
    """Only the rows of this locale, where the data has a column named locale."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the model is held. auto: float32, and for the base of an adapter on a GPU the
    checkpoint's own."""

    cpu: bool = False
    """Use the CPU although there is a GPU."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    tokenizer: str | None = None
    """Tokenizer, when it is not the model's own: a hub id or a folder."""

    chat_template: Path | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class FisherConfig(FisherOptions):
    """Estimate how much each parameter of a model matters on some data: its diagonal Fisher information, which
    meldkit merge weighs parameters by. One squared gradient an example, never of a batch's sum. Written as
    safetensors, under the names of the model's (or the adapter's) own file."""

    out: Path
    """File to write, e.g. fisher.safetensors. A file of that name is replaced."""
