"""The layers of a model: found by the names of its tensors, cut into slices, counted in its configuration.

A list of layers is a run of tensors ``PREFIX.0.…`` to ``PREFIX.(N - 1).…`` (``model.layers.3.mlp.down_proj.weight``,
``transformer.h.3.attn.c_proj.weight``, ``encoder.layer.3.output.dense.bias``). Experts inside a layer belong to it.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Keys of config.json that say how many layers there are, here or in the configuration of a part (text_config).
COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "encoder_layers",
    "depth",
)
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
# Lists of numbers of layers, not of one element a layer.
INDEX_LISTS = ("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")
# Parts of the names of lists with one element a layer: layer_types, no_rope_layers, layers_block_type.
LAYER_WORDS = ("layer", "block", "pattern")
BEFORE_THE_LAYERS = ("emb", "wte", "wpe", "shared.")
BEHIND_THE_LAYERS = ("embed_out", "embedding_norm", "lm_head")

NUMBERED = re.compile(r"(?:(.*?)\.)?([0-9]+)\.(.+)")

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerList:
    """``prefix`` without the dot before the number."""

    prefix: str
    num_layers: int

    def name(self, layer: int, rest: str) -> str:
        return f"{self.prefix}.{layer}.{rest}" if self.prefix else f"{layer}.{rest}"


def split_name(name: str) -> tuple[str, int, str] | None:
    """``a.b.3.c.5.d`` as ("a.b", 3, "c.5.d"); None where no part is a number."""
    match = NUMBERED.fullmatch(name)
    return None if match is None else (match[1] or "", int(match[2]), match[3])


class Layers:
    """The lists of layers of one model.

    Args:
        names: of its tensors.
        config: its config.json.
    """

    def __init__(self, names: Iterable[str], config: Mapping[str, Any]) -> None:
        numbers: dict[str, set[int]] = {}
        for name in names:
            split = split_name(name)
            if split is not None:
                numbers.setdefault(split[0], set()).add(split[1])
        whole = {prefix: len(found) for prefix, found in numbers.items() if max(found) + 1 == len(found)}
        counts = counts_in(config)
        lists = {prefix: count for prefix, count in whole.items() if count in counts.values()}
        self.main = _main_list(lists or whole, counts)
        if self.main is not None:
            lists[self.main.prefix] = self.main.num_layers
        self.lists = lists

    def depth(self, name: str) -> float:
        """t of a tensor: 0 in the first layer of its list, 1 in the last one (and in an only one); 0 outside."""
        split = split_name(name)
        if split is None or split[0] not in self.lists:
            return 0.0
        last = self.lists[split[0]] - 1
        return split[1] / last if last else 1.0

    def in_main(self, name: str) -> tuple[int, str] | None:
        """Number and rest of the name of a tensor in the main list."""
        split = split_name(name)
        if split is None or self.main is None or split[0] != self.main.prefix:
            return None
        return split[1], split[2]


def _main_list(lists: Mapping[str, int], counts: Mapping[KeyPath, int]) -> LayerList | None:
    """The list whose length the text model's configuration names, else the longest."""
    if not lists:
        return None
    wanted = next((counts[path] for path in _by_importance(counts)), None)
    best = max(lists, key=lambda prefix: (lists[prefix] == wanted, "decoder" in prefix, lists[prefix]))
    return LayerList(best, lists[best])


def counts_in(config: Mapping[str, Any]) -> dict[KeyPath, int]:
    """Every number of layers that a configuration names, by the path of its key."""
    found: dict[KeyPath, int] = {}
    for key, value in config.items():
        if key in COUNT_KEYS and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[(key,)] = value
        elif key.endswith("config") and isinstance(value, Mapping):
            found |= {(key, *path): count for path, count in counts_in(value).items()}
    return found


def _by_importance(counts: Mapping[KeyPath, int]) -> list[KeyPath]:
    def rank(path: KeyPath) -> tuple[bool, int, int]:
        *above, key = path
        return bool(above) and above[0] not in TEXT_CONFIGS, len(path), COUNT_KEYS.index(key)

    return sorted(counts, key=rank)


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside of the layers comes before them (embeddings), not behind (final norm, head)."""
    return any(part in name for part in BEFORE_THE_LAYERS) and not any(
        part in name for part in BEHIND_THE_LAYERS
    )


def with_layers(
    config: Mapping[str, Any],
    old_count: int,
    origins: Sequence[tuple[Mapping[str, Any], int]],
    module: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """A configuration for a model of other layers.

    Args:
        config: of the model that the others follow.
        old_count: its number of layers.
        origins: for each layer of the result the configuration of the model that it comes from, and its number there.
        module: name of the part that has these layers, where a model has several.

    Returns:
        The configuration, and notes on what could not be adapted.
    """
    new = copy.deepcopy(dict(config))
    paths = [path for path in _by_importance(counts_in(config)) if counts_in(config)[path] == old_count]
    named = [path for path in paths if module and module.split("_")[0] in ".".join(path)]
    if not paths:
        return new, [
            f"config.json names no number of layers that is {old_count}: set it to {len(origins)} yourself"
        ]
    path = (named or paths)[0]
    part = _at(new, path[:-1])
    part[path[-1]] = len(origins)
    for key, value in list(part.items()):
        own = [(_at(origin, path[:-1]).get(key), layer) for origin, layer in origins]
        if key in INDEX_LISTS and isinstance(value, list):
            part[key] = [place for place, (numbers, layer) in enumerate(own) if layer in (numbers or [])]
        elif isinstance(value, list) and len(value) == old_count and any(word in key for word in LAYER_WORDS):
            part[key] = [_element(values, layer, value) for values, layer in own]
    return new, []


def _element(values: Any, layer: int, fallback: list[Any]) -> Any:
    values = values if isinstance(values, list) and layer < len(values) else fallback
    return values[min(layer, len(values) - 1)]


def _at(config: Any, path: KeyPath) -> Any:
    for key in path:
        config = config.get(key, {}) if isinstance(config, Mapping) else {}
    return config
