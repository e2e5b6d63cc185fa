"""Merging LoRA adapters without expanding them, and models with adapters as inputs of any merge method. No torch."""

from toolkit.merging.lora.adapter import Adapter
from toolkit.merging.lora.adapter_source import AdaptedSource

__all__ = ["AdaptedSource", "Adapter"]
