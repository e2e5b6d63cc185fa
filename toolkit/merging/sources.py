"""A model as named tensors: the contract between recipes, which choose tensors, and the engine, which reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from toolkit.merging.group import Reader


class Source(Protocol):
    """The tensors of one model.

    Attributes:
        label: as the user named it.
        folder: where configuration and tokenizer lie.
        config: config.json.
        files: weights files, for hashing.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]

    def names(self) -> list[str]:
        """Tensor names, by file and by place in the file."""
        ...

    def reader(self, name: str) -> Reader:
        """Raises KeyError where there is no such tensor."""
        ...
