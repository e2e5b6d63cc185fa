"""The remainder of averaged factors, folded into the base: FedEx-LoRA (Singhal et al. 2024, arXiv:2410.09432).

W' = W + sum_k w_k s_k B_k A_k - s B A with the merged factors as they are stored, so that W' + s B A is exact but for
the rounding of W' to the base's type. K + 1 low-rank changes of the base: written by the streaming engine.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from toolkit import durable
from toolkit.errors import ModelError
from toolkit.merging.group import stored_dtype
from toolkit.merging.lora import adapter_config
from toolkit.merging.lora.adapter_source import AdaptedSource
from toolkit.merging.lora.arrays import widened
from toolkit.merging.lora.merge import MergedAdapter
from toolkit.merging.plan import InputModel, MergePlan, OutputTensor
from toolkit.merging.recipes.companions import OTHER_FILES, TOKENIZER_FILES, copy_file
from toolkit.merging.sources import Source
from toolkit.merging.streaming.engine import EngineOptions, execute


def write(merged: MergedAdapter, base: Source, staged: Path, final: Path) -> MergedAdapter:
    """Write the base with the remainder and return the adapter that belongs to it.

    Args:
        merged: by the mode ``residual``.
        base: the model of the adapters.
        staged: where to write it.
        final: where it will lie when it is complete.

    Raises:
        ModelError: the adapters do not fit the base, or bring an embedding of their own.
    """
    merged = _on(merged, base, final)
    source = base
    for adapter, weight in merged.remainder():
        source = AdaptedSource(source, adapter, weight)
    plan = _plan(merged, base, source)
    execute(plan, staged, EngineOptions())
    return merged


def _on(merged: MergedAdapter, base: Source, final: Path) -> MergedAdapter:
    """The merged adapter for the new base: PEFT would put back an adapted layer's weight that it holds."""
    kept = {}
    for name, array in merged.adapter.replaced.items():
        if name.rpartition(".")[0] not in merged.adapter.modules:
            kept[name] = array
            continue
        try:
            reader = base.reader(name)
        except KeyError:
            raise ModelError(f"{name} of the adapters is not in {base.label}") from None
        span = reader.span(0, int(np.prod(reader.shape)))
        same = reader.shape == array.shape and np.array_equal(
            widened(np.asarray(span.data), span.dtype), array.float64().reshape(-1)
        )
        if not same:
            raise ModelError(
                f"the adapters bring another {name} than {base.label} has, to which nothing can be added",
                hint="merge by concat or svd, or give the base with that embedding",
            )
    raw = {**merged.adapter.config.raw, "base_model_name_or_path": str(final), "revision": None}
    adapter = replace(merged.adapter, replaced=kept, config=adapter_config.parse(raw, merged.adapter.where))
    return replace(merged, adapter=adapter)


def _plan(merged: MergedAdapter, base: Source, source: Source) -> MergePlan:
    def write_companions(folder: Path) -> None:
        durable.write_json(folder / "config.json", dict(source.config))
        for name in OTHER_FILES:
            copy_file(base.folder, name, folder)
        for name in TOKENIZER_FILES:
            copy_file(getattr(base, "tokenizer_folder", base.folder), name, folder)

    tensors = []
    for name in source.names():
        reader = source.reader(name)
        dtype = stored_dtype(reader)
        tensors.append(OutputTensor(name, reader.shape, dtype, (reader,)))
    inputs = [InputModel(base.label, "base", base.files)]
    inputs += [
        InputModel(adapter.where, "adapter", (adapter.file,))
        for adapter, _ in merged.parts
        if adapter.file is not None
    ]
    settings = {"weights": [weight for _, weight in merged.parts]}
    return MergePlan(tensors, inputs, "residual", 0, settings, [], write_companions)
