"""Examples and batches of the estimate: rows or collated batches in, batches of similar length out."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.data.collate import Collator
from toolkit.data.columns import IGNORED
from toolkit.errors import DataError
from toolkit.merging.fisher.likelihood import Task


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples that go through the model together.

    Attributes:
        inputs: tensors for the model, without the labels: input_ids [B, T], attention_mask [B, T], ...
        labels: int64 [B] or [B, T].
        examples: what each row is called: its number in the data, and of a packed row the part's number.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    examples: list[str]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def num_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def to(self, device: torch.device) -> "Batch":
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(moved, self.labels.to(device), self.examples)

    def columns(self, row: int) -> slice:
        """The part of a row that is not padding."""
        mask = self.inputs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return slice(0, self.num_tokens)
        used = mask[row].nonzero()
        return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)

    def select(self, rows: Sequence[int]) -> "Batch":
        """These rows, without columns that are padding in all of them."""
        columns = [self.columns(row) for row in rows]
        cut = slice(min(c.start for c in columns), max(c.stop for c in columns))
        index, width = list(rows), self.num_tokens
        inputs = {}
        for name, tensor in self.inputs.items():
            chosen = tensor[index] if tensor.shape[:1] == (len(self),) else tensor
            inputs[name] = chosen[:, cut] if chosen.dim() == 2 and chosen.shape[1] == width else chosen
        labels = self.labels[index]
        labels = labels[:, cut] if labels.dim() == 2 else labels
        return Batch(inputs, labels, [self.examples[row] for row in index])


def make_batches(
    data: Iterable[Mapping[str, Any]],
    *,
    task: Task,
    num_examples: int | None,
    batch_size: int,
    seed: int,
    pad_token_id: int,
) -> list[Batch]:
    """Batches of the examples that count.

    Args:
        data: prepared rows (``input_ids`` and ``labels`` of one example each; packed rows are taken apart), or batches
            that are collated already (``input_ids`` of two dimensions), which stay as they are.
        task: decides what labels are.
        num_examples: use so many: of rows drawn by ``seed``, of batches the first ones. None: all.
        batch_size: rows a batch. Rows are sorted by length, longest first: less padding, and what does not fit into
            the memory fails at once.
        seed: of the draw.
        pad_token_id: of the model.

    Raises:
        DataError: no example with a label.
    """
    if num_examples is not None and num_examples < 1:
        raise DataError(f"num_examples is {num_examples}; at least 1 is needed")
    items: Any = data if isinstance(data, Sized) and hasattr(data, "__getitem__") else list(data)
    if len(items) and torch.as_tensor(items[0]["input_ids"]).dim() == 2:
        batches = _collated(items, num_examples, task)
    else:
        rows = _chosen(items, num_examples, seed, task)
        collator = Collator(pad_token_id, task)
        batches = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            tensors = collator([row for _, row in part])
            batches.append(Batch(tensors, tensors.pop("labels"), [name for name, _ in part]))
    if not batches:
        raise DataError("there is no example with a label to estimate Fisher information from")
    return batches


def _collated(items: Iterable[Mapping[str, Any]], num_examples: int | None, task: Task) -> list[Batch]:
    batches: list[Batch] = []
    count = 0
    for item in items:
        if num_examples is not None and count >= num_examples:
            break
        inputs = {name: value for name, value in item.items() if isinstance(value, torch.Tensor)}
        labels = inputs.pop("labels")
        batch = Batch(inputs, labels, [str(count + row) for row in range(len(labels))])
        count += len(batch)
        kept = [row for row in range(len(batch)) if task != "causal-lm" or _is_trained(labels[row])]
        if num_examples is not None:
            kept = kept[: len(kept) - max(0, count - num_examples)]
        if kept:
            batches.append(batch if len(kept) == len(batch) else batch.select(kept))
    return batches


def _chosen(
    items: Any, num_examples: int | None, seed: int, task: Task
) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and row of the examples, the longest first."""
    order = list(range(len(items)))
    if num_examples is not None:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for number in order:
        if num_examples is not None and len(rows) >= num_examples:
            break
        parts = _unpacked(items[number])
        names = [str(number)] if len(parts) == 1 else [f"{number}.{part}" for part in range(len(parts))]
        rows += [
            (name, part)
            for name, part in zip(names, parts, strict=True)
            if task != "causal-lm" or _is_trained(torch.as_tensor(part["labels"]))
        ]
    return sorted(rows[:num_examples], key=lambda row: (-len(row[1]["input_ids"]), row[0]))


def _is_trained(labels: torch.Tensor) -> bool:
    """Whether a language model's row has a label; the first token is predicted by nothing."""
    return bool((labels[1:] != IGNORED).any())


def _unpacked(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that packing has put into one sequence: each is an example of its own."""
    lengths = row.get("seq_lengths")
    if lengths is None:
        return [row]
    stops = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    return [
        {name: row[name][stop - length : stop] for name in ("input_ids", "labels")}
        for stop, length in zip(stops, lengths, strict=True)
    ]


def fingerprint(batches: Sequence[Batch]) -> str:
    """SHA-256 over the examples' tokens and labels without padding; the order and the batches do not matter."""
    digests = []
    for batch in batches:
        for row in range(len(batch)):
            alone = batch.select([row])
            ids = alone.inputs["input_ids"].to("cpu", torch.int64).numpy().tobytes()
            labels = alone.labels.to("cpu", torch.int64).numpy().tobytes()
            digests.append(hashlib.sha256(len(ids).to_bytes(8, "little") + ids + labels).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
