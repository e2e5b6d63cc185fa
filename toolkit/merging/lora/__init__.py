"""Merging LoRA adapters without expanding them, and models with adapters as inputs of any merge method. No torch."""

from toolkit.merging.lora.adapter import Adapter
from toolkit.merging.lora.adapter_source import AdaptedSource
from toolkit.merging.lora.merge import MergedAdapter, merge_adapter_states
from toolkit.merging.lora.merge_modules import MODES
from toolkit.merging.lora.output import AdapterMergeReport, merge_adapters

__all__ = [
    "MODES",
    "AdaptedSource",
    "Adapter",
    "AdapterMergeReport",
    "MergedAdapter",
    "merge_adapter_states",
    "merge_adapters",
]
