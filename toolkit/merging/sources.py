"""A model as named tensors: the contract between recipes, which choose tensors, and the engine, which reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from toolkit.merging.group import Reader


class Source(Protocol):
    """The tensors of one model."""

    @property
    def label(self) -> str:
        """As the user named it."""
        ...

    @property
    def folder(self) -> Path:
        """Where configuration and tokenizer lie."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Weights files, for hashing."""
        ...

    def names(self) -> list[str]:
        """Tensor names, by file and by place in the file."""
        ...

    def reader(self, name: str) -> Reader:
        """Raises KeyError where there is no such tensor."""
        ...
