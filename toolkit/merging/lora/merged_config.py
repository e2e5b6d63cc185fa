"""adapter_config.json of a merged adapter: ranks and alphas by which PEFT finds the scale of every module."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.merging.lora.adapter import Adapter
from toolkit.merging.lora.adapter_config import exact_pattern
from toolkit.merging.lora.merge_modules import MergedModules

# Options that say which modules are adapted.
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Options of how training began; a merged adapter begins nowhere.
INITIALISATION = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config")


def merged_config(adapters: Sequence[Adapter], merged: MergedModules) -> dict[str, Any]:
    """The first adapter's configuration with the ranks, alphas and targets of the merged one."""
    config = dict(adapters[0].config.raw)
    ranks = {name: module.rank for name, module in merged.modules.items()}
    config["r"], config["rank_pattern"] = _common(ranks, config.get("r", 8))
    config["lora_alpha"], config["alpha_pattern"] = _common(
        {name: int(alpha) if float(alpha).is_integer() else alpha for name, alpha in merged.alphas.items()},
        config.get("lora_alpha", 8),
    )
    config |= {
        "use_rslora": merged.use_rslora,
        "lora_bias": any(module.bias is not None for module in merged.modules.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        **{option: {} if option == "loftq_config" else None for option in INITIALISATION if option in config},
    }
    saved = {name for adapter in adapters for name in adapter.config.raw.get("modules_to_save") or ()}
    config["modules_to_save"] = sorted(saved) or None
    if any(_targets(adapter) != _targets(adapters[0]) for adapter in adapters[1:]):
        config |= dict.fromkeys(TARGETS)
        config["target_modules"] = sorted(merged.modules)
    return config


def _targets(adapter: Adapter) -> list[Any]:
    values = (adapter.config.raw.get(option) for option in TARGETS)
    return [sorted(value) if isinstance(value, list) else value for value in values]


def _common(values: Mapping[str, Any], otherwise: Any) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and patterns for the modules that have another one."""
    if not values:
        return otherwise, {}
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {exact_pattern(name): value for name, value in values.items() if value != common}
