"""Merging adapters: in memory, for federated rounds, and from folder to folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from toolkit.config.names import did_you_mean
from toolkit.errors import ConfigError, ModelError
from toolkit.merging.lora import adapter_config
from toolkit.merging.lora.adapter import Adapter
from toolkit.merging.lora.merge_modules import MODES, Mode, ModuleError, Request, merge_modules, relative
from toolkit.merging.lora.merged_config import merged_config
from toolkit_kernels.spans import CODES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """The result of a merge of adapters.

    Attributes:
        adapter: the merged one.
        parts: what was merged, with the weights that were used.
        mode: by which.
        errors: of every module.
        notes: for the user.
    """

    adapter: Adapter
    parts: tuple[tuple[Adapter, float], ...]
    mode: str
    errors: tuple[ModuleError, ...]
    notes: tuple[str, ...]

    @property
    def relative_error(self) -> float | None:
        """||merged - exact||_F / ||exact||_F over all modules, before rounding; None where the exact sum is zero."""
        return relative(
            math.hypot(*(entry.error for entry in self.errors)), math.hypot(*(e.norm for e in self.errors))
        )

    @property
    def relative_rounding_error(self) -> float | None:
        """What rounding the factors to their type adds to it, at most."""
        rounding = math.hypot(*(entry.rounding_error for entry in self.errors))
        return relative(rounding, math.hypot(*(entry.norm for entry in self.errors)))

    @property
    def config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return dict(self.adapter.config.raw)

    def state(self) -> "dict[str, torch.Tensor]":
        """The tensors as PEFT's set_peft_model_state_dict takes them."""
        return {name: array.to_torch() for name, array in self.adapter.arrays().items()}

    def remainder(self) -> list[tuple[Adapter, float]]:
        """Adapters whose weighted sum is what the merged factors miss: sum_k w_k B_k A_k - B A, for the base."""
        parts = [*self.parts, (self.adapter, -1.0)]
        return [(_factors_only(adapter), weight) for adapter, weight in parts] if len(self.parts) > 1 else []

    def summary(self) -> list[str]:
        """A few lines for the user: what was done and how exact it is. Without ``notes``."""
        ranks = [entry.rank for entry in self.errors] or [0]
        rank = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        error, rounding = self.relative_error, self.relative_rounding_error
        what = "goes into the base" if self.mode == "residual" else "is lost"
        lines = [
            f"{self.mode}: {_counted(len(self.parts), 'adapter')}, {_counted(len(self.errors), 'module')}, rank {rank}",
            f"relative error {_percent(error)}{f' ({what})' if error else ''}, rounding {_percent(rounding)}",
        ]
        worst = max(self.errors, key=lambda entry: entry.relative_error or 0.0, default=None)
        if worst is not None and error:
            lines.append(f"largest error in {worst.name}: {_percent(worst.relative_error)}")
        if whole := list(self.adapter.replaced):
            more = f" and {_counted(len(whole) - 1, 'more whole tensor')}" if whole[1:] else ""
            lines.append(f"{whole[0]}{more}: the weighted mean")
        return lines


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _percent(value: float | None) -> str:
    return "undefined (the exact sum is zero)" if value is None else f"{100 * value:.3g} %"


def _factors_only(adapter: Adapter) -> Adapter:
    modules = {name: replace(module, bias=None) for name, module in adapter.modules.items()}
    return replace(adapter, modules=modules, replaced={}, tokens={})


def merge_adapter_states(
    states: Sequence[Mapping[str, Any]],
    configs: Sequence[Any],
    weights: Sequence[float] | None = None,
    mode: str = "concat",
    *,
    rank: int | None = None,
    normalize: bool = True,
    dtype: str | None = None,
    names: Sequence[str] | None = None,
) -> MergedAdapter:
    """Merge K adapters in memory, never expanding one to the size of the model.

    Modules: sum_k w_k s_k B_k A_k with s_k as PEFT resolves it (rsLoRA, patterns). Whole tensors (modules_to_save) and
    DoRA's magnitudes: sum_k w_k theta_k / sum_k w_k.

    Args:
        states: as PEFT's get_peft_model_state_dict gives them.
        configs: K of PEFT's LoraConfig, or contents of adapter_config.json; or one for all.
        weights: w_k, negative ones too; None for equal ones.
        mode: ``concat`` (exact), ``svd``, ``residual`` or ``factors``; see MODES. The remainder of ``residual`` is
            :meth:`MergedAdapter.remainder`.
        rank: of ``svd``; None for the largest of a module's ranks.
        normalize: divide the weights by their sum.
        dtype: of the factors; None for their own in ``factors`` and ``residual``, for float32 in the others.
        names: of the adapters, for messages.

    Raises:
        ConfigError: mode, weights, rank or dtype are wrong.
        ModelError: a state is not that of a LoRA adapter, or adapters do not fit together.
    """
    if len(configs) == 1:
        configs = [configs[0]] * len(states)
    names = names or [f"adapter {number}" for number in range(len(states))]
    checked = check_options(len(states), weights, mode, rank, normalize, dtype)
    adapters = [
        Adapter.from_state(state, config, name)
        for state, config, name in zip(states, configs, names, strict=True)
    ]
    return merge(adapters, *checked)


def merge(adapters: Sequence[Adapter], weights: Sequence[float], request: Request) -> MergedAdapter:
    """Merge adapters that have been read, with checked options."""
    merged = merge_modules(adapters, weights, request)
    config = adapter_config.parse(merged_config(adapters, merged), "the merged adapter")
    adapter = Adapter("the merged adapter", config, merged.modules, merged.replaced, merged.tokens)
    parts = tuple(zip(adapters, weights, strict=True))
    return MergedAdapter(adapter, parts, request.mode, tuple(merged.errors), tuple(merged.notes))


def check_options(
    num_adapters: int,
    weights: Sequence[float] | None,
    mode: str,
    rank: int | None,
    normalize: bool,
    dtype: str | None,
) -> tuple[list[float], Request]:
    """The weights to use and what is wanted.

    Raises:
        ConfigError: all that is wrong.
    """
    weights = [1.0] * num_adapters if weights is None else [float(weight) for weight in weights]
    problems = []
    if not num_adapters:
        problems.append("there is no adapter to merge")
    if mode not in MODES:
        problems.append(f"no mode {mode!r}{did_you_mean(mode, MODES)}; there are {', '.join(MODES)}")
    if len(weights) != num_adapters:
        problems.append(f"{len(weights)} weights for {num_adapters} adapters")
    if not all(math.isfinite(weight) for weight in weights):
        problems.append(f"weights are finite numbers, not {weights}")
    elif normalize and weights and not sum(weights):
        problems.append(f"the weights {weights} add up to 0 and cannot be normalised")
    if rank is not None and mode != "svd":
        problems.append(f"a rank is chosen in the mode svd only, not in {mode}")
    if rank is not None and rank < 1:
        problems.append(f"the rank is {rank}, and must be at least 1")
    if dtype is not None and dtype not in CODES:
        problems.append(f"no dtype {dtype!r}; there are {', '.join(CODES)}")
    if problems:
        raise ConfigError(problems)
    if normalize:
        total = math.fsum(weights)
        weights = [weight / total for weight in weights]
    return weights, Request(cast(Mode, mode), rank, dtype)


def check_same_base(adapters: Sequence[Adapter], *, lenient: bool) -> list[str]:
    """Notes on adapters of different bases or tasks.

    Raises:
        ModelError: there are such, and ``lenient`` is False.
    """
    notes = []
    first = adapters[0]
    for adapter in adapters[1:]:
        differences = [
            f"{what} {ours or 'unnamed'} and {theirs or 'unnamed'}"
            for what, ours, theirs in (
                ("base", _base(first), _base(adapter)),
                ("revision", first.config.revision, adapter.config.revision),
                ("task", first.config.task_type, adapter.config.task_type),
            )
            if ours != theirs
        ]
        if differences:
            notes.append(f"{first.where} and {adapter.where} differ: {'; '.join(differences)}")
    if notes and not lenient:
        raise ModelError(
            "\n".join(notes),
            hint="adapters of different bases do not add up; --lenient merges them all the same",
        )
    return notes


def _base(adapter: Adapter) -> str | None:
    name = adapter.config.base
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name
