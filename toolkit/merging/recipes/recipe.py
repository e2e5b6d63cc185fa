"""What a user asks a merge to do, as it stands in a recipe file: mergekit's grammar and our additions to it.

Nothing here has been compared with models yet; :mod:`toolkit.merging.recipes.resolve` does that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Scalar = bool | int | float | str

FISHER_SETTINGS = ("fisher", "preconditioner_path")


@dataclass(frozen=True, slots=True)
class Location:
    """A folder, or a hub id with the revision that is meant."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model, with adapters on it or without: ``path[@revision][+adapter[@revision]]``."""

    model: Location
    loras: tuple[Location, ...] = ()

    def __str__(self) -> str:
        return "+".join(str(part) for part in (self.model, *self.loras))

    @classmethod
    def parse(cls, text: str) -> "ModelReference":
        """Read the short form; a text that names something that exists is that path, ``@`` and ``+`` or not.

        Raises:
            ValueError: it is not of that form.
        """
        if Path(text).expanduser().exists():
            return cls(Location(text))
        model, *loras = [location(part) for part in text.split("+")]
        return cls(model, tuple(loras))


def location(text: str) -> Location:
    """``path[@revision]``. Raises ValueError."""
    if Path(text).expanduser().exists():
        return Location(text)
    path, at, revision = text.partition("@")
    if not path.strip():
        raise ValueError(f"'{text}' names no model")
    if at and (not revision or "@" in revision):
        raise ValueError(f"'{text}' is not PATH or PATH@REVISION")
    return Location(path.strip(), revision or None)


@dataclass(frozen=True, slots=True)
class Condition:
    """One value of a parameter, or a list of values over the depth of the model, for the tensors that a filter names.

    Attributes:
        value: a scalar; or a gradient, first layer to last.
        filter: part of a tensor's name; None for all tensors.
    """

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter as the recipe sets it: the first condition that fits a tensor counts.

    Attributes:
        place: file and line, or the flag, for messages.
    """

    conditions: tuple[Condition, ...]
    place: str


Settings = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class InputModel:
    """An entry of ``models``."""

    model: ModelReference
    parameters: Settings
    place: str


@dataclass(frozen=True, slots=True)
class InputSlice:
    """An entry of ``sources``: layers ``start`` to ``stop`` (not included) of a model."""

    model: ModelReference
    start: int
    stop: int
    parameters: Settings
    place: str


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """An entry of ``slices``: layers of the result, merged from as many layers of each source."""

    sources: tuple[InputSlice, ...]
    base_model: ModelReference | None
    parameters: Settings
    place: str

    @property
    def num_layers(self) -> int:
        return self.sources[0].stop - self.sources[0].start


@dataclass(frozen=True, slots=True)
class OutputModule:
    """An entry of ``modules``: a part of the result with models or slices of its own."""

    models: tuple[InputModel, ...]
    slices: tuple[OutputSlice, ...]
    parameters: Settings
    place: str


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where the embedding of one token comes from.

    Attributes:
        kind: "default" (by mergekit's rules), "zero", "model" (the row of the same token in ``model``) or
            "model_token" (the row of ``token`` or ``token_id`` in ``model``).
        force: also for models that have the token.
    """

    kind: str
    model: ModelReference | None
    token: str | None
    token_id: int | None
    force: bool
    place: str


@dataclass(frozen=True, slots=True)
class TokenizerRequest:
    """``tokenizer_source`` or ``tokenizer``.

    Attributes:
        source: "union", "base" or a model.
        tokens: tokens with an embedding of a chosen origin; those that the tokenizer lacks are added to it.
        pad_to_multiple_of: for the number of rows of embeddings.
    """

    source: str | ModelReference
    tokens: Mapping[str, TokenSource]
    pad_to_multiple_of: int | None
    place: str


@dataclass(frozen=True)
class MergeRecipe:
    """A recipe. Exactly one of ``models``, ``slices`` and ``modules`` is not empty.

    Attributes:
        name: the file, or the command line, for messages.
        text: the recipe as YAML, verbatim where a file was read.
        notes: what is said in it and has no effect.
    """

    name: str
    text: str
    merge_method: str
    models: tuple[InputModel, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    modules: Mapping[str, OutputModule] = field(default_factory=dict)
    base_model: ModelReference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerRequest | None = None
    chat_template: str | None = None
    parameters: Settings = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def references(self) -> list[ModelReference]:
        """Every model once: the base first, then as they are written."""
        return list(dict.fromkeys(self._references()))

    def _references(self) -> Iterator[ModelReference]:
        if self.base_model is not None:
            yield self.base_model
        yield from (entry.model for entry in self.models)
        slices = [*self.slices, *(part for module in self.modules.values() for part in module.slices)]
        for part in slices:
            if part.base_model is not None:
                yield part.base_model
            yield from (source.model for source in part.sources)
        for module in self.modules.values():
            yield from (entry.model for entry in module.models)

    def settings(self) -> Iterator[Settings]:
        """The parameters of every level."""
        yield self.parameters
        yield from (entry.parameters for entry in self.models)
        slices = [*self.slices, *(part for module in self.modules.values() for part in module.slices)]
        for part in slices:
            yield part.parameters
            yield from (source.parameters for source in part.sources)
        for module in self.modules.values():
            yield module.parameters
            yield from (entry.parameters for entry in module.models)
