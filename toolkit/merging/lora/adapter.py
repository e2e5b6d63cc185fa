"""A LoRA adapter as modules: for each one the factors B A, their scale, and what else it changes.

Legend: [r, in] and [out, r] are the shapes of A and B; a module adds scale * B A to its weight [out, in].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ModelError
from toolkit.merging.lora import adapter_config, adapter_file
from toolkit.merging.lora.adapter_config import AdapterConfig
from toolkit.merging.lora.arrays import Array, arrays_of

PREFIX = "base_model.model."
# Name of a part of a module -> the end of its tensor's name.
LINEAR_PARTS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "bias": ".lora_B.bias"}
EMBEDDING_PARTS = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
MAGNITUDE = ".lora_magnitude_vector"
TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """What an adapter does to one linear or embedding layer.

    Attributes:
        name: of the module in the model.
        a: [r, in]; of an embedding in is the number of rows of its weight.
        b: [out, r].
        scale: factor of B A.
        is_embedding: the weight is [in, out].
        magnitude: [out] of DoRA (Liu et al. 2024, arXiv:2402.09353).
        bias: [out], multiplied by the scale.
    """

    name: str
    a: Array
    b: Array
    scale: float
    is_embedding: bool = False
    magnitude: Array | None = None
    bias: Array | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def arrays(self) -> dict[str, Array]:
        """Tensors under the names of PEFT's files."""
        parts = EMBEDDING_PARTS if self.is_embedding else LINEAR_PARTS
        found = {PREFIX + self.name + end: getattr(self, part) for part, end in parts.items()}
        found[PREFIX + self.name + MAGNITUDE] = self.magnitude
        return {name: array for name, array in found.items() if array is not None}


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of an embedding that an adapter replaces.

    Attributes:
        indices: of the rows.
        rows: [len(indices), out].
    """

    indices: tuple[int, ...]
    rows: Array


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter.

    Attributes:
        where: folder or name, for messages.
        config: its options.
        modules: by name.
        replaced: whole tensors (modules_to_save, resized embeddings) by their name in the model.
        tokens: trained rows of embeddings, by module.
        folder: None of a state in memory.
    """

    where: str
    config: AdapterConfig
    modules: Mapping[str, LoraModule]
    replaced: Mapping[str, Array]
    tokens: Mapping[str, TokenRows]
    folder: Path | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "Adapter":
        """Read an adapter that PEFT saved; tensors are mapped, not loaded.

        Raises:
            ModelError: a file is missing, damaged or a pickle; the adapter is of a kind that is not merged, or its
                tensors do not fit its configuration, or are not finite.
        """
        config = adapter_config.parse(
            adapter_file.read_config(folder), str(folder / adapter_file.CONFIG_NAME)
        )
        return _assemble(str(folder), config, adapter_file.read_tensors(folder), folder)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], config: Any, where: str) -> "Adapter":
        """An adapter in memory.

        Args:
            state: as PEFT's get_peft_model_state_dict gives it (tensors of torch, or numpy arrays).
            config: PEFT's LoraConfig, or the content of adapter_config.json.
            where: its name in messages.

        Raises:
            ModelError: as of :meth:`from_folder`.
        """
        return _assemble(where, adapter_config.parse(config, where), arrays_of(state, where), None)

    @property
    def file(self) -> Path | None:
        return None if self.folder is None else self.folder / adapter_file.WEIGHTS_NAME

    def changes(self, module: str) -> bool:
        """Whether it adapts or replaces the weight of a module."""
        return module in self.modules or f"{module}.weight" in self.replaced

    def arrays(self) -> dict[str, Array]:
        """All tensors under the names of PEFT's files."""
        tensors: dict[str, Array] = {}
        for module in self.modules.values():
            tensors |= module.arrays()
        for name, array in self.replaced.items():
            module = name.rpartition(".")[0]
            own = f"{module}.base_layer.weight" if module in self.modules else name
            tensors[PREFIX + own] = array
        for name, entry in self.tokens.items():
            tensors[PREFIX + name + TOKENS] = entry.rows
        return tensors


def _assemble(
    where: str, config: AdapterConfig, tensors: Mapping[str, Array], folder: Path | None
) -> Adapter:
    parts: dict[str, dict[str, Array]] = {}
    replaced: dict[str, Array] = {}
    tokens: dict[str, TokenRows] = {}
    for full_name, array in tensors.items():
        if not full_name.startswith(PREFIX):
            raise ModelError(f"{where}: {full_name} is not a tensor of an adapter as PEFT saves it")
        if count := array.num_non_finite():
            raise ModelError(f"{where}: {full_name} has {count} NaN or infinite values")
        name = full_name.removeprefix(PREFIX)
        module, part = _part(name)
        if part is not None:
            parts.setdefault(module, {})[part] = array
        elif name.endswith(TOKENS):
            module = name.removesuffix(TOKENS)
            tokens[module] = _token_rows(where, config, module, array)
        elif ".lora_" in name or ".token_adapter." in name:
            raise ModelError(f"{where}: {full_name} is not known here and would be lost")
        elif ".original_module." not in name:
            replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = array
    if not (parts or replaced or tokens):
        raise ModelError(f"{where}: the adapter holds no tensors")
    modules = {name: _module(where, config, name, found) for name, found in parts.items()}
    return Adapter(where, config, modules, replaced, tokens, folder)


def _part(name: str) -> tuple[str, str | None]:
    """Module and part of a LoRA tensor; part None for other tensors."""
    name = name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name
    ends = {
        **{end: part for part, end in LINEAR_PARTS.items()},
        **{end: f"embedding_{part}" for part, end in EMBEDDING_PARTS.items()},
        MAGNITUDE: "magnitude",
    }
    for end, part in ends.items():
        if name.endswith(end):
            return name.removesuffix(end), part
    return name, None


def _module(where: str, config: AdapterConfig, name: str, parts: Mapping[str, Array]) -> LoraModule:
    is_embedding = "embedding_a" in parts or "embedding_b" in parts
    a, b = (parts.get(f"embedding_{p}" if is_embedding else p) for p in ("a", "b"))
    if a is None or b is None:
        raise ModelError(f"{where}: {name} lacks its factor {'A' if a is None else 'B'}")
    if len(a.shape) != 2 or len(b.shape) != 2:
        what = "convolutions are not merged" if len(a.shape) > 2 else "shards of it were not gathered"
        raise ModelError(f"{where}: {name} has factors of shapes {a.shape} and {b.shape}; {what}")
    rank = config.rank_of(name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(
            f"{where}: {name} has factors {b.shape} and {a.shape}, and the configuration says rank {rank}"
        )
    magnitude, bias = parts.get("magnitude"), parts.get("bias")
    if config.use_dora != (magnitude is not None):
        raise ModelError(f"{where}: use_dora is {config.use_dora}, and {name} says otherwise")
    for what, vector in (("lora_magnitude_vector", magnitude), ("lora_B.bias", bias)):
        if vector is not None and vector.shape != b.shape[:1]:
            raise ModelError(f"{where}: {name}.{what} has shape {vector.shape}, and B has {b.shape}")
    return LoraModule(name, a, b, config.scale_of(name), is_embedding, magnitude, bias)


def _token_rows(where: str, config: AdapterConfig, module: str, rows: Array) -> TokenRows:
    matching = [i for key, i in config.token_indices.items() if key and f".{module}".endswith(f".{key}")]
    indices = matching[0] if matching else config.token_indices.get(None, [])
    if len(rows.shape) != 2 or len(indices) != rows.shape[0] or min(indices, default=0) < 0:
        raise ModelError(
            f"{where}: {module} has {rows.shape[0]} trained rows, and trainable_token_indices names {len(indices)}"
        )
    return TokenRows(tuple(indices), rows)
