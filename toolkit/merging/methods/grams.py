"""Products of the inputs of linear layers, which RegMean needs: collected from data, in memory or as a file.

The file: safetensors; for each linear layer one float32 matrix [in, in], the mean of x x^T over the layer's inputs x,
under the name of the layer's weight. Its metadata: ``format``, ``num_examples``.
"""

import os
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from toolkit.durable import STAGING_PREFIX, sync
from toolkit.errors import ModelError
from toolkit.merging.methods.rows import read
from toolkit.merging.streaming.safetensors_file import WeightsFile

FORMAT = "meldkit-grams-1"


@dataclass(frozen=True, slots=True)
class Grams:
    """Products of the inputs of linear layers.

    Attributes:
        tensors: float32 [in, in] by the name of the layer's weight.
        num_examples: rows of the batches that they were collected over.
    """

    tensors: Mapping[str, torch.Tensor]
    num_examples: int

    def save(self, path: str | Path) -> None:
        """Write the file. A file of that name is replaced once the new one is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{STAGING_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            beside.touch()  # readable as the user's other files are; safetensors makes files for the owner only
            mode = beside.stat().st_mode
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, beside, metadata={"format": FORMAT, "num_examples": str(self.num_examples)})
            beside.chmod(mode)
            sync(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync(path.parent)


def gram(source: Grams | str | Path, name: str, length: int, device: str) -> torch.Tensor | None:
    """[in, in] float64 for the weight ``name``; None where the layer was not collected.

    A file is opened for each call: one that was written anew is seen.

    Raises:
        ModelError: the file is none of these, or its matrix does not fit ``length``, the weight's [.., in].
    """
    if isinstance(source, Grams):
        tensor, where = source.tensors.get(name), "the Gram matrices"
    else:
        where = str(source)
        file = WeightsFile(Path(source))
        if file.header.metadata.get("format") != FORMAT:
            raise ModelError(
                f"{where} does not hold Gram matrices of inputs",
                hint="toolkit.merging.methods.grams.collect_grams(model, batches).save(FILE) makes such a file",
            )
        tensor = None
        if name in file.header.entries:
            reader = file.reader(name)
            tensor = read(reader.span(0, prod(reader.shape)), device).view(reader.shape)
    if tensor is None:
        return None
    if tuple(tensor.shape) != (length, length):
        raise ModelError(
            f"{where}: {name} has shape {tuple(tensor.shape)}, and the layer takes {length} inputs"
        )
    return tensor.to(device, torch.float64)


@torch.no_grad()
def collect_grams(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], names: Collection[str] | None = None
) -> Grams:
    """Run a model over data and collect the mean of x x^T over the inputs x of its linear layers.

    Positions that the batch's ``attention_mask`` leaves out do not count.

    Args:
        model: is called with each batch as keyword arguments, in the mode that it is in.
        batches: tensors [B, ...] by argument name, on the model's device.
        names: weights whose layers to collect; None for all ``nn.Linear``. A layer takes 4 in^2 bytes.

    Returns:
        Matrices in float32; layers that no input reached have none.

    Raises:
        ModelError: no layer has one of the names.

    Source: Jin et al. 2023, arXiv:2212.09849.
    """
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (names is None or f"{name}.weight" in names)
    }
    if not layers:
        raise ModelError("the model has no linear layer to collect inputs of")
    sums: dict[str, torch.Tensor] = {}
    num_rows = dict.fromkeys(layers, 0)
    mask: torch.Tensor | None = None

    def record(name: str, _layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if mask is not None and x.shape[:2] == mask.shape:
            x = x[mask]
        rows = x.reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        sums[name].addmm_(rows.mT, rows)
        num_rows[name] += len(rows)

    handles = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers.items()]
    num_examples = 0
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            num_examples += len(next(iter(batch.values())))
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return Grams(
        {name: total / num_rows[name] for name, total in sums.items() if num_rows[name]}, num_examples
    )
