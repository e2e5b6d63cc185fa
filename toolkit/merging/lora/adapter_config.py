"""adapter_config.json, checked: what PEFT would do with it, or an error that names what is not merged here."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import ModelError

# Options that change what an adapter computes in a way that B A alone does not say; with the reason.
UNSUPPORTED = {
    "layer_replication": "layers are repeated",
    "target_parameters": "parameters of experts are adapted, not modules",
    "alora_invocation_tokens": "the adapter acts on some tokens only",
    "use_qalora": "quantization-aware LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "adapters are chosen token by token",
    "kasa_config": "KaSA changes the base",
    "monteclora_config": "sampled factors",
    "megatron_config": "Megatron layers",
}
# Initialisations that subtract the start from the base: saved as they are, such adapters do not belong to the base.
CHANGES_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Options of a LoRA adapter under PEFT's names.

    Attributes:
        raw: the whole file.
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: regular expression -> rank, alpha.
        token_indices: module name, or None for the input embedding -> rows that are trained.
    """

    raw: Mapping[str, Any]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    base: str | None
    revision: str | None
    task_type: str | None
    ensure_weight_tying: bool
    token_indices: Mapping[str | None, list[int]]

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        return _by_pattern(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def parse(config: Any, where: str) -> AdapterConfig:
    """Check a configuration: the content of adapter_config.json, or PEFT's LoraConfig.

    Raises:
        ModelError: not LoRA, or an option that is not merged here; the message names it.
    """
    raw = plain(config if isinstance(config, Mapping) else config.to_dict())
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"{where}: peft_type is {kind!r}; only LORA adapters (with rsLoRA and DoRA) are merged"
        )
    for option, reason in UNSUPPORTED.items():
        if raw.get(option):
            raise ModelError(f"{where}: {option} is set ({reason}), which is not merged")
    if raw.get("bias", "none") != "none":
        raise ModelError(f"{where}: bias is {raw['bias']!r}; only adapters with bias 'none' are merged")
    start = str(raw.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        raise ModelError(
            f"{where}: init_lora_weights is {start!r}, so the adapter belongs to a changed base",
            hint="save it with save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT first",
        )
    indices = raw.get("trainable_token_indices") or {}
    return AdapterConfig(
        raw,
        raw.get("r", 8),
        raw.get("lora_alpha", 8),
        _patterns(raw, "rank_pattern", where),
        _patterns(raw, "alpha_pattern", where),
        bool(raw.get("use_rslora")),
        bool(raw.get("use_dora")),
        bool(raw.get("fan_in_fan_out")),
        raw.get("base_model_name_or_path"),
        raw.get("revision"),
        raw.get("task_type"),
        bool(raw.get("ensure_weight_tying")),
        {None: indices} if isinstance(indices, list) else indices,
    )


def plain(value: Any) -> Any:
    """What JSON holds of a configuration: sets as sorted lists, enumerations as their values."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(entry) for entry in value)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return getattr(value, "value", value)


def _patterns(raw: Mapping[str, Any], option: str, where: str) -> dict[str, Any]:
    patterns = raw.get(option) or {}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(
                f"{where}: {option} has {pattern!r}, not a regular expression: {error}"
            ) from error
    return dict(patterns)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The first pattern that matches the name, or its end from a dot on, wins; as in PEFT's get_pattern_key."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def exact_pattern(module: str) -> str:
    """A pattern that matches this module and no other."""
    return f"^{re.escape(module)}"
