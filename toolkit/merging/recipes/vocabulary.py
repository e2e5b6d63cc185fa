"""Models with different vocabularies: each model's embeddings in the order of the result's.

A token that a model lacks gets an embedding by mergekit's rules: of the only model that has it, else of the base, else
the mean of the models that have it; zeros where none has it; or what the recipe says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import ModelError
from toolkit.merging.group import Reader
from toolkit.merging.recipes.recipe import ModelReference, TokenSource
from toolkit.merging.recipes.rows import (
    FirstRows,
    Integers,
    MeanOfAllRows,
    MeanRows,
    Zeros,
    gathered,
    wide_dtype,
)

# Endings of the names of tensors with one row for each token.
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
)
HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
)
HEAD_BIASES = (
    "lm_head.bias",
    "embed_out.bias",
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
    "lm_head.decoder.bias",
)


def ends_with(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a tensor's name ends with whole parts of one of ``endings``."""
    return name.endswith(endings) and any(name == ending or name.endswith(f".{ending}") for ending in endings)


def has_row_for_each_token(name: str) -> bool:
    return ends_with(name, EMBEDDINGS) or ends_with(name, HEADS) or ends_with(name, HEAD_BIASES)


class Alignment:
    """Gives the readers of one vocabulary tensor the same rows, in the same order.

    Attributes:
        notes: what the user should know.
    """

    notes: list[str]

    def aligned(self, name: str, readers: Mapping[ModelReference, Reader]) -> dict[ModelReference, Reader]:
        """Raises ModelError."""
        raise NotImplementedError

    def aligned_fisher(
        self,
        name: str,
        readers: Mapping[ModelReference, Reader],
        fishers: Mapping[ModelReference, Reader],
    ) -> dict[ModelReference, Reader]:
        """The Fisher information of the same rows: zeros where a model's row is not its own.

        Args:
            readers: as for ``aligned``.
            fishers: of some of the models, of their tensors' shapes.
        """
        raise NotImplementedError


class Truncated(Alignment):
    """mergekit's --unsafe-truncate-embeddings: the first rows, as many as the smallest vocabulary has."""

    def __init__(self) -> None:
        self.notes = []

    def aligned(self, name: str, readers: Mapping[ModelReference, Reader]) -> dict[ModelReference, Reader]:
        num_rows = min(reader.shape[0] for reader in readers.values())
        cut = [str(model) for model, reader in readers.items() if reader.shape[0] > num_rows]
        if cut:
            self.notes.append(
                f"{name}: cut to {num_rows} rows in {', '.join(cut)}; tokens keep their numbers"
            )
        return {
            model: reader if reader.shape[0] == num_rows else FirstRows(reader, num_rows)
            for model, reader in readers.items()
        }

    def aligned_fisher(
        self,
        name: str,
        readers: Mapping[ModelReference, Reader],
        fishers: Mapping[ModelReference, Reader],
    ) -> dict[ModelReference, Reader]:
        num_rows = min(reader.shape[0] for reader in readers.values())
        return {model: FirstRows(fisher, num_rows) for model, fisher in fishers.items()}


@dataclass
class Unified(Alignment):
    """One tokenizer for all models.

    Attributes:
        tokens: of the result, by number.
        vocabularies: of every model that is merged: token to number.
        base: whose embeddings stand in for missing ones.
        origin: folder of the tokenizer's files.
        tokenizer: of the tokenizers library where it is not the one in ``origin``; None where its files are copied.
        requests: what the recipe says of single tokens.
        pad_to_multiple_of: for the number of rows.
        keeps_rows: no fewer rows than the base's embeddings have, which may be padded.
    """

    tokens: dict[str, int]
    vocabularies: dict[ModelReference, dict[str, int]]
    base: ModelReference
    origin: Path
    tokenizer: Any
    requests: Mapping[str, TokenSource]
    pad_to_multiple_of: int | None
    keeps_rows: bool
    notes: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return max(self.tokens.values(), default=-1) + 1

    def num_rows(self, base_rows: int) -> int:
        if self.pad_to_multiple_of:
            return -(-self.num_tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return max(self.num_tokens, base_rows if self.keeps_rows else 0)

    def aligned(self, name: str, readers: Mapping[ModelReference, Reader]) -> dict[ModelReference, Reader]:
        """The readers with a row for each token of the result, then the rows that fill up the vocabulary."""
        return _Rows(self, name, readers).readers()

    def aligned_fisher(
        self,
        name: str,
        readers: Mapping[ModelReference, Reader],
        fishers: Mapping[ModelReference, Reader],
    ) -> dict[ModelReference, Reader]:
        rows = _Rows(self, name, readers)
        return {model: rows.fisher(model, fisher) for model, fisher in fishers.items()}


class _Rows:
    """The rows of one tensor, of all models."""

    def __init__(self, unified: Unified, name: str, readers: Mapping[ModelReference, Reader]) -> None:
        self.unified = unified
        self.name = name
        self.models = list(readers)
        self.parts: list[Reader] = list(readers.values())
        widths = {reader.shape[1:] for reader in self.parts}
        if len(widths) > 1:
            shapes = ", ".join(f"{list(r.shape)} in {r.where}" for r in self.parts)
            raise ModelError(
                f"{name}: {shapes}; tokenizer_source aligns rows, their lengths must be the same"
            )
        base = readers.get(unified.base, self.parts[0])
        self.num_rows = unified.num_rows(base.shape[0])
        # [V, K]: the row of each token in each model, -1 where it has none.
        self.own_VK = np.full((unified.num_tokens, len(self.models)), -1, np.int64)
        for k, (model, reader) in enumerate(readers.items()):
            vocabulary, rows = unified.vocabularies[model], reader.shape[0]
            for token, number in unified.tokens.items():
                row = vocabulary.get(token, -1)
                self.own_VK[number, k] = row if row < rows else -1

    def readers(self) -> dict[ModelReference, Reader]:
        stand_ins, forced = self._stand_ins(), self._forced()
        found: dict[ModelReference, Reader] = {}
        for k, model in enumerate(self.models):
            part_V = np.full(self.unified.num_tokens, k, np.int64)
            row_V = self.own_VK[:, k].copy()
            for token, (part, row) in stand_ins.items():
                if row_V[token] < 0 or token in forced:
                    part_V[token], row_V[token] = part, row
            found[model] = self._padded(k, part_V, row_V)
        return found

    def _padded(self, k: int, part_V: Integers, row_V: Integers) -> Reader:
        """The rows of model k, and behind the last token as many more as the vocabulary is to have.

        These are the model's own rows there where its tokens have the numbers of the result, else the mean of all its
        embeddings (Hewitt 2021, Initializing new word embeddings for pretrained language models).
        """
        padding = self.num_rows - self.unified.num_tokens
        if padding <= 0:
            return gathered(self.parts, part_V, row_V)
        parts, part, rows = self.parts, k, np.arange(self.unified.num_tokens, self.num_rows)
        if not self._pads_itself(k):
            parts = [*self.parts, MeanOfAllRows(gathered(self.parts, part_V, row_V))]
            part, rows = len(self.parts), np.zeros(padding, np.int64)
        return gathered(parts, np.append(part_V, np.full(padding, part)), np.append(row_V, rows))

    def fisher(self, model: ModelReference, own: Reader) -> Reader:
        """A model's Fisher information in the order of the result."""
        k = self.models.index(model)
        row_V = self.own_VK[:, k].copy()
        row_V[sorted(self._forced())] = -1
        padding = np.arange(self.unified.num_tokens, self.num_rows)
        row_V = np.append(row_V, padding if self._pads_itself(k) else np.full(len(padding), -1))
        is_own = row_V >= 0
        zeros = Zeros((len(row_V), *own.shape[1:]), own.dtype)
        # Zeros at the places that they go to: those that follow each other are one run.
        return gathered([own, zeros], np.where(is_own, 0, 1), np.where(is_own, row_V, np.arange(len(row_V))))

    def _pads_itself(self, k: int) -> bool:
        """Whether the rows of model k behind its last token are those of the result."""
        return self.parts[k].shape[0] >= self.num_rows and bool(
            np.array_equal(self.own_VK[:, k], np.arange(self.unified.num_tokens))
        )

    def _forced(self) -> set[int]:
        """The tokens that get the same embedding in every model, whether it has one or not."""
        wanted = self.unified.requests.items()
        forced = {token for token, request in wanted if request.force and request.kind != "default"}
        return {number for token, number in self.unified.tokens.items() if token in forced}

    def _stand_ins(self) -> dict[int, tuple[int, int]]:
        """Part and row for tokens that a model may lack, by token."""
        stand_ins: dict[int, tuple[int, int]] = {}
        numbers = {
            token: number for token, number in self.unified.tokens.items() if token in self.unified.requests
        }
        for token, number in numbers.items():
            request = self.unified.requests[token]
            if request.kind != "default":
                stand_ins[number] = self._requested(token, number, request)
        has_VK = self.own_VK >= 0
        lacking = [int(v) for v in np.flatnonzero(~has_VK.all(axis=1)) if int(v) not in stand_ins]
        base = self.models.index(self.unified.base) if self.unified.base in self.models else None
        averaged: list[int] = []
        unknown: list[int] = []
        for v in lacking:
            holders = np.flatnonzero(has_VK[v])
            if not len(holders):
                unknown.append(v)
            elif len(holders) == 1 or (base is not None and has_VK[v, base]):
                k = int(holders[0]) if len(holders) == 1 or base is None else base
                stand_ins[v] = (k, int(self.own_VK[v, k]))
            else:
                averaged.append(v)
        if averaged:
            self.parts.append(MeanRows(tuple(self.parts[: len(self.models)]), self.own_VK[averaged]))
            stand_ins |= {v: (len(self.parts) - 1, place) for place, v in enumerate(averaged)}
        if unknown:
            part = self._zeros()
            stand_ins |= dict.fromkeys(unknown, (part, 0))
            self._note_unknown(unknown)
        return stand_ins

    def _requested(self, token: str, number: int, request: TokenSource) -> tuple[int, int]:
        if request.kind == "zero" or request.model is None:
            return self._zeros(), 0
        if request.model not in self.models:
            raise ModelError(f"{request.place}: '{token}': {self.name} is not merged from {request.model}")
        k = self.models.index(request.model)
        wanted = token if request.kind == "model" else request.token
        vocabulary = self.unified.vocabularies[request.model]
        row = vocabulary.get(wanted, -1) if wanted is not None else request.token_id
        if row is None or not 0 <= row < self.parts[k].shape[0]:
            what = f"'{wanted}'" if wanted is not None else f"number {row}"
            raise ModelError(f"{request.place}: '{token}': {request.model} has no embedding of {what}")
        return k, row

    def _zeros(self) -> int:
        zeros = next((place for place, part in enumerate(self.parts) if isinstance(part, Zeros)), None)
        if zeros is None:
            dtypes = {part.dtype for part in self.parts[: len(self.models)]}
            dtype = dtypes.pop() if len(dtypes) == 1 else wide_dtype(sorted(dtypes))
            self.parts.append(Zeros((1, *self.parts[0].shape[1:]), dtype))
            zeros = len(self.parts) - 1
        return zeros

    def _note_unknown(self, numbers: Sequence[int]) -> None:
        names = {number: token for token, number in self.unified.tokens.items()}
        shown = ", ".join(repr(names.get(number, f"number {number}")) for number in numbers[:5])
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        self.unified.notes.append(f"{self.name}: no model has an embedding of {shown}{more}; they are zeros")
