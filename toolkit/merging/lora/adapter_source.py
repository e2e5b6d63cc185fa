"""Base and adapters as one model, applied while it is read: an input of any merge method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import ModelError
from toolkit.merging.group import Reader
from toolkit.merging.lora.adapted_config import INPUT_EMBEDDINGS, adapted_config, is_dropped
from toolkit.merging.lora.adapted_reader import AdaptedReader, Change, LowRank, ReplacingReader
from toolkit.merging.lora.adapter import Adapter, LoraModule
from toolkit.merging.lora.arrays import Array
from toolkit.merging.sources import Source
from toolkit_kernels.spans import CODES

# Architectures whose linear layers, but for the heads, hold their weight as [in, out].
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
HEAD = "lm_head.weight"
ONE = Array(np.ones((1, 1), np.float32), "float32")


class AdaptedSource:
    """A base model with a LoRA adapter: a Source whose tensors are W + weight * (V - W).

    V is the tensor as PEFT's merge_and_unload leaves it: with scale * B A added (rsLoRA and patterns as PEFT resolves
    them), rescaled (DoRA), or replaced (modules_to_save). Where the base is an AdaptedSource itself, all V are those of
    the one base: W + sum_k weight_k (V_k - W). A tensor that the base lacks, such as a new head, is the weighted mean
    of those of the adapters. An embedding and a head that share their weights become two tensors where an adapter
    changes only one of them. Where the last adapter changes what config.json says (number of labels, vocabulary,
    architecture, tied weights), ``config`` says so.

    Args:
        base: the model.
        adapter_folder: as PEFT saved it; or an adapter that was read.
        weight: of the adapter.

    Attributes:
        tokenizer_folder: the last adapter's, where it brings a tokenizer; else the base's.

    Raises:
        ModelError: the adapter cannot be read, is of a kind that is not merged, or does not fit the base.
    """

    def __init__(self, base: Source, adapter_folder: Path | Adapter, weight: float = 1.0) -> None:
        is_read = isinstance(adapter_folder, Adapter)
        adapter = adapter_folder if is_read else Adapter.from_folder(Path(adapter_folder))
        inner = base if isinstance(base, AdaptedSource) else None
        self._base: Source = inner._base if inner else base
        self._weighted: list[tuple[Adapter, float]] = [*(inner._weighted if inner else []), (adapter, weight)]
        times = "" if weight == 1.0 else f"*{weight:g}"
        self.label = f"{base.label}+{Path(adapter.where).name}{times}"
        self.folder = base.folder
        self.notes: list[str] = getattr(base, "notes", [])
        self.tokenizer_folder: Path = getattr(base, "tokenizer_folder", base.folder)
        if adapter.folder is not None and (adapter.folder / "tokenizer_config.json").is_file():
            self.tokenizer_folder = adapter.folder
        self.files = (*base.files, *([adapter.file] if adapter.file else []))
        self._names = list(self._base.names())
        self._known = set(self._names)
        self._prefixes = {name.partition(".")[0] for name in self._names}
        self._changes: dict[str, list[Change]] = {}
        self._readers: dict[str, Reader] = {}
        self._tied = HEAD not in self._known and self._can_read(HEAD)
        for entry, factor in self._weighted:
            self._add(entry, factor)
        replaced = {
            name: change.replacement.shape
            for name, changes in self._changes.items()
            for change in changes
            if change.replacement is not None
        }
        self.config: Mapping[str, Any] = adapted_config(base.config, adapter.config.task_type, replaced)
        self._names = [name for name in self._names if not is_dropped(name, self._base.config, self.config)]
        if not is_dropped(HEAD, self._base.config, self.config):
            self._untie()
            self._check_vocabulary()
        self._names += [name for name in self._changes if name not in self._known and name not in self._names]

    def names(self) -> list[str]:
        return list(self._names)

    def reader(self, name: str) -> Reader:
        """Raises KeyError where there is no such tensor, ModelError where an adapter does not fit it."""
        if name not in self._changes:
            return self._base.reader(name)
        if name not in self._readers:
            self._readers[name] = self._adapted(name)
        return self._readers[name]

    def _can_read(self, name: str) -> bool:
        try:
            self._base.reader(name)
        except KeyError:
            return False
        return True

    def _add(self, adapter: Adapter, weight: float) -> None:
        """Note what the adapter changes. Two adapters that change the same tensor give it two changes."""
        for module in adapter.modules.values():
            name = self._find(f"{module.name}.weight")
            if name is None:
                raise ModelError(
                    f"{adapter.where} adapts {module.name}, which {self._base.label} does not have",
                    hint="the adapter belongs to another model",
                )
            change = self._change(adapter, module, name, weight)
            self._note(name, change)
            if change.replacement is not None and self._tied and not adapter.changes("lm_head"):
                self._note(HEAD, Change(weight, replacement=change.replacement))  # they shared this new base
            if module.bias is not None:
                self._add_bias(adapter, module, weight)
        for own_name, array in adapter.replaced.items():
            if own_name.removesuffix(".weight") not in adapter.modules:
                self._note(self._find(own_name) or own_name, Change(weight, replacement=array))
        for module_name, tokens in adapter.tokens.items():
            name = self._find(f"{module_name}.weight")
            if name is None:
                raise ModelError(
                    f"{adapter.where} trains rows of {module_name}, which {self._base.label} does not have"
                )
            self._note(name, Change(weight, tokens=tokens))

    def _add_bias(self, adapter: Adapter, module: LoraModule, weight: float) -> None:
        name = self._find(f"{module.name}.bias")
        if name is None or module.bias is None:
            raise ModelError(
                f"{adapter.where} has a bias for {module.name}, which has none in {self._base.label}"
            )
        column = Array(module.bias.values.reshape(-1, 1), module.bias.dtype)
        self._note(name, Change(weight, LowRank(column, ONE, module.scale)))

    def _note(self, name: str, change: Change) -> None:
        self._changes.setdefault(name, []).append(change)

    def _find(self, name: str) -> str | None:
        """The base's name of a tensor: files of a model without head lack the prefix of the model with one."""
        stripped = name.partition(".")[2]
        for candidate in (name, stripped, *(f"{prefix}.{name}" for prefix in self._prefixes)):
            if candidate in self._known:
                return candidate
        return name if name == HEAD and self._tied else None

    def _change(self, adapter: Adapter, module: LoraModule, name: str, weight: float) -> Change:
        """The change of a module's weight, its factors in the order in which the base holds the weight."""
        replacement = adapter.replaced.get(f"{module.name}.weight")
        base = self._base.reader(name)
        if base.dtype not in CODES:
            raise ModelError(
                f"{base.where}: {name} is {base.dtype}; an adapter cannot be added to quantized weights"
            )
        shape = base.shape if replacement is None else replacement.shape
        update = LowRank(module.b, module.a, module.scale)
        out_in = (module.b.shape[0], module.a.shape[1])
        if shape not in (out_in, out_in[::-1]):
            raise ModelError(
                f"{adapter.where}: {module.name} adds {out_in}, and {name} in {base.where} has shape {shape}",
                hint="the adapter belongs to another model, or one of another vocabulary",
            )
        is_transposed = shape != out_in or (out_in[0] == out_in[1] and self._holds_in_out(adapter, module))
        if is_transposed:
            update = update.transposed()
        return Change(weight, update, replacement, module.magnitude, is_transposed)

    def _holds_in_out(self, adapter: Adapter, module: LoraModule) -> bool:
        """Whether a square weight is held as [in, out]. PEFT's fan_in_fan_out is that of the last layer it made."""
        if module.is_embedding:
            return True
        if self._base.config.get("model_type") in CONV1D_MODELS:
            return module.name.rpartition(".")[2] not in ("lm_head", "score", "classifier")
        return adapter.config.fan_in_fan_out

    def _untie(self) -> None:
        """Give the head a tensor of its own where it no longer equals the embedding."""
        embedding = next((name for name in self._changes if INPUT_EMBEDDINGS.fullmatch(name)), None)
        if not self._tied or (embedding is None and HEAD not in self._changes):
            return
        tokens_only = embedding is not None and all(c.tokens is not None for c in self._changes[embedding])
        together = all(adapter.config.ensure_weight_tying for adapter, _ in self._weighted)
        if embedding is not None and (tokens_only or together or self._same(embedding)):
            self._changes.pop(HEAD, None)
            return
        self._names.append(HEAD)
        self.config = {**self.config, "tie_word_embeddings": False}

    def _check_vocabulary(self) -> None:
        vocabulary = self.config.get("vocab_size")
        if (
            HEAD not in self._known
            or HEAD in self._changes
            or vocabulary == self._base.config.get("vocab_size")
        ):
            return
        rows = self._base.reader(HEAD).shape[0]
        raise ModelError(
            f"{self.label} has an embedding for {vocabulary} tokens, and {HEAD} of the base has {rows} rows",
            hint="train the adapter with lm_head among its modules_to_save, so that PEFT saves the new rows",
        )

    def _same(self, embedding: str) -> bool:
        """Whether every adapter replaces embedding and head by the same values, and does no more."""
        ours, heads = self._changes[embedding], self._changes.get(HEAD, [])
        return len(ours) == len(heads) and all(
            one.only_replaces
            and other.only_replaces
            and one.replacement is not None
            and other.replacement is not None
            and one.replacement.equals(other.replacement)
            for one, other in zip(ours, heads, strict=True)
        )

    def _adapted(self, name: str) -> Reader:
        changes = self._changes[name]
        where = " + ".join([self._base.label, *(adapter.where for adapter, _ in self._weighted)])
        replacements = [change.replacement for change in changes if change.replacement is not None]
        base = self._base.reader(name) if name in self._known or name == HEAD else None
        shape = replacements[0].shape if replacements else base.shape if base is not None else ()
        if any(replacement.shape != shape for replacement in replacements):
            shapes = ", ".join(str(replacement.shape) for replacement in replacements)
            raise ModelError(f"{where}: {name} has the shapes {shapes}; give adapters with the same one")
        result_dtype = base.dtype if base is not None and base.dtype in CODES else None
        if len(changes) == 1 and changes[0].only_replaces and (changes[0].weight == 1.0 or base is None):
            new = replacements[0]
            return ReplacingReader(new.span(), new.shape, new.dtype, where, result_dtype or new.dtype)
        if base is not None and base.shape != shape:
            base = None
        if base is None:
            if len(replacements) < len(changes):
                raise ModelError(f"{where}: {name} has another shape in one adapter than in the base")
            if not sum(change.weight for change in changes):
                raise ModelError(f"{where}: {name} is not in the base, and the adapters' weights add up to 0")
        return AdaptedReader(base, shape, changes, where, result_dtype)
