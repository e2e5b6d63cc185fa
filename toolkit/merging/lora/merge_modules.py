"""One adapter from several: the factors of every module by a mode, whole tensors by their mean."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from toolkit.errors import ModelError
from toolkit.merging.lora import rank_space
from toolkit.merging.lora.adapter import Adapter, LoraModule, TokenRows
from toolkit.merging.lora.arrays import Array, weighted_sum, widest
from toolkit.merging.lora.rank_space import Factors, Stack

Mode = Literal["concat", "svd", "residual", "factors"]
# What each mode does, and the paper.
MODES: Mapping[str, str] = {
    "concat": "stack the factors: exact, of the sum of the ranks (FLoRA, arXiv:2409.05976)",
    "svd": "the exact sum, truncated to a rank by QR of the factors (FlexLoRA, arXiv:2402.11505)",
    "residual": "average A and B, and add the exact remainder to the base (FedEx-LoRA, arXiv:2410.09432)",
    "factors": "average A and B, which is not the average of the products B A (FedIT, arXiv:2305.05644)",
}


@dataclass(frozen=True, slots=True)
class ModuleError:
    """How far a module's merged product is from the exact sum Delta of the adapters.

    Attributes:
        name: of the module.
        rank: of the merged factors.
        norm: ||Delta||_F.
        error: ||B A - Delta||_F of the mode, before rounding; of ``residual`` it is what goes into the base.
        rounding_error: by rounding the factors to their type.
    """

    name: str
    rank: int
    norm: float
    error: float
    rounding_error: float

    @property
    def relative_error(self) -> float | None:
        """error / norm; None where Delta is zero and the product is not."""
        return relative(self.error, self.norm)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "relative_error": self.relative_error}


def relative(error: float, norm: float) -> float | None:
    return 0.0 if error == 0 else error / norm if norm else None


@dataclass(frozen=True, slots=True)
class MergedModules:
    """Everything that the merged adapter holds.

    Attributes:
        modules: by name, with PEFT's scale.
        alphas: lora_alpha of each.
        use_rslora: how ``alphas`` are meant.
        errors: of each.
        replaced, tokens: as in Adapter.
        notes: for the user.
    """

    modules: dict[str, LoraModule]
    alphas: dict[str, float]
    use_rslora: bool
    errors: list[ModuleError]
    replaced: dict[str, Array]
    tokens: dict[str, TokenRows]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted.

    Attributes:
        mode: a key of MODES.
        rank: of ``svd``; None for the largest of a module's ranks.
        dtype: of the factors; None for the adapters' own in ``factors`` and ``residual``, for float32 in the others,
            which would not be exact in less.
    """

    mode: Mode
    rank: int | None = None
    dtype: str | None = None

    @property
    def averages_factors(self) -> bool:
        return self.mode in ("factors", "residual")


Owners = Sequence[tuple[Adapter, float]]


def merge_modules(adapters: Sequence[Adapter], weights: Sequence[float], request: Request) -> MergedModules:
    """Merge K adapters with weights w_k that are final.

    Raises:
        ModelError: ranks, shapes or kinds of the adapters do not fit together; the message names the module.
    """
    weighted = list(zip(adapters, weights, strict=True))
    notes = _check_dora(adapters, request)
    use_rslora = request.averages_factors and adapters[0].config.use_rslora
    has_bias = any(module.bias is not None for adapter in adapters for module in adapter.modules.values())
    embeddings = [name for adapter in adapters for name, m in adapter.modules.items() if m.is_embedding]
    if has_bias and embeddings:
        raise ModelError(
            f"one adapter has lora_bias, and {embeddings[0]} is an embedding: PEFT has no such adapter"
        )
    merged: dict[str, tuple[LoraModule, float, ModuleError]] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        owners = [(adapter, weight) for adapter, weight in weighted if name in adapter.modules]
        merged[name] = _merge_module(name, owners, request, use_rslora, has_bias)
    replaced: dict[str, Array] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.replaced):
        owners = [(adapter, weight) for adapter, weight in weighted if name in adapter.replaced]
        replaced[name] = _mean(name, owners, [adapter.replaced[name] for adapter, _ in owners])
        if len(owners) < len(adapters):
            notes.append(f"{name} is not in every adapter: it is the weighted mean of those that have it")
    return MergedModules(
        {name: module for name, (module, _, _) in merged.items()},
        {name: alpha for name, (_, alpha, _) in merged.items()},
        use_rslora,
        [error for _, _, error in merged.values()],
        replaced,
        _merge_tokens(weighted),
        notes,
    )


def _merge_module(
    name: str, owners: Owners, request: Request, use_rslora: bool, has_bias: bool
) -> tuple[LoraModule, float, ModuleError]:
    """The merged module, its lora_alpha and its error."""
    found = [adapter.modules[name] for adapter, _ in owners]
    shapes = {(module.b.shape[0], module.a.shape[1], module.is_embedding) for module in found}
    if len(shapes) > 1:
        raise _differ(name, owners, [(module.b.shape[0], module.a.shape[1]) for module in found])
    weights = [weight for _, weight in owners]
    if request.averages_factors:
        alpha, scale = _alpha_and_scale(owners[0][0], name, use_rslora)
        factors, b, a = _averaged(name, owners, scale, request.dtype)
    else:
        stack = Stack.of(found, weights)
        rank = request.rank or max(stack.ranks)
        factors = (
            rank_space.truncated(stack, rank) if request.mode == "svd" else rank_space.concatenated(stack)
        )
        dtype = request.dtype or "float32"
        b, a = Array.rounded(factors.b, dtype), Array.rounded(factors.a, dtype)
        alpha, scale = b.shape[1], 1.0
    bias = None
    if has_bias and not found[0].is_embedding:
        bias = _bias(found, weights, scale, b)
    magnitudes = [module.magnitude for module in found if module.magnitude is not None]
    magnitude = _mean(f"{name}.lora_magnitude_vector", owners, magnitudes) if magnitudes else None
    module = LoraModule(name, a, b, scale, found[0].is_embedding, magnitude, bias)
    rounding = abs(scale) * rank_space.rounding_error(factors, b, a)
    return module, alpha, ModuleError(name, module.rank, factors.norm, factors.error, rounding)


def _alpha_and_scale(adapter: Adapter, name: str, use_rslora: bool) -> tuple[float, float]:
    """lora_alpha and scale of the first adapter that has the module, in the result's way of scaling."""
    scale = adapter.modules[name].scale
    if adapter.config.use_rslora == use_rslora:
        return adapter.config.alpha_of(name), scale
    rank = adapter.modules[name].rank
    return scale * (rank**0.5 if use_rslora else rank), scale


def _averaged(name: str, owners: Owners, scale: float, dtype: str | None) -> tuple[Factors, Array, Array]:
    """Means of the factors by the merge kernels, and in float64 for their error."""
    found = [adapter.modules[name] for adapter, _ in owners]
    weights = np.array([weight for _, weight in owners])
    if len({module.rank for module in found}) > 1:
        ranks = ", ".join(
            f"{module.rank} in {adapter.where}" for module, (adapter, _) in zip(found, owners, strict=True)
        )
        raise ModelError(
            f"{name} has the rank {ranks}; factors of different ranks have no mean",
            hint="merge by concat or svd",
        )
    if not weights.sum():
        raise ModelError(
            f"{name}: the weights add up to 0, so its factors have no mean", hint="merge by concat or svd"
        )
    if not scale:
        raise ModelError(f"{name}: lora_alpha of {owners[0][0].where} is 0", hint="leave that adapter out")
    in_scale = weights * np.array([module.scale for module in found]) / scale
    b = weighted_sum([module.b for module in found], in_scale, dtype or widest([m.b for m in found]))
    a = weighted_sum([m.a for m in found], weights / weights.sum(), dtype or widest([m.a for m in found]))
    return rank_space.averaged(Stack.of(found, weights.tolist()), weights.tolist(), scale), b, a


def _bias(found: Sequence[LoraModule], weights: Sequence[float], scale: float, b: Array) -> Array:
    """Biases add up exactly: sum_k w_k s_k bias_k / scale; zero where an adapter has none."""
    zero = Array(np.zeros(b.shape[0], np.float32), "float32")
    biases = [module.bias or zero for module in found]
    in_scale = np.array([w * module.scale / scale for w, module in zip(weights, found, strict=True)])
    return weighted_sum(biases, in_scale, b.dtype)


def _mean(name: str, owners: Owners, arrays: list[Array]) -> Array:
    """sum_k w_k array_k / sum_k w_k by the merge kernels, rounded once to the widest of the types."""
    weights = np.array([weight for _, weight in owners])
    if len({array.shape for array in arrays}) > 1:
        raise _differ(name, owners, [array.shape for array in arrays])
    if not weights.sum():
        raise ModelError(f"{name}: the weights add up to 0, so there is no mean of it")
    return weighted_sum(arrays, weights / weights.sum(), widest(arrays))


def _merge_tokens(weighted: Owners) -> dict[str, TokenRows]:
    tokens: dict[str, TokenRows] = {}
    for name in dict.fromkeys(name for adapter, _ in weighted for name in adapter.tokens):
        found = [adapter.tokens.get(name) for adapter, _ in weighted]
        indices = {entry.indices for entry in found if entry is not None}
        if None in found or len(indices) > 1:
            raise ModelError(
                f"the adapters train different rows of {name}, whose mean needs the base",
                hint="give base+adapter as models of a full merge",
            )
        rows = _mean(f"rows of {name}", weighted, [entry.rows for entry in found if entry is not None])
        tokens[name] = TokenRows(indices.pop(), rows)
    return tokens


def _check_dora(adapters: Sequence[Adapter], request: Request) -> list[str]:
    """DoRA's W = m (W_0 + B A) / norm is no low-rank change: for several adapters the merge is an approximation."""
    users = [adapter for adapter in adapters if adapter.config.use_dora]
    if not users or len(adapters) == 1:
        return []
    hint = "give base+adapter as models of a full merge, which is exact"
    others = [adapter for adapter in adapters if not adapter.config.use_dora]
    if others:
        raise ModelError(f"{users[0].where} uses DoRA, {others[0].where} does not", hint=hint)
    if request.mode == "residual":
        raise ModelError("the remainder of several DoRA adapters is not of low rank", hint=hint)
    names = set(adapters[0].modules)
    for adapter in adapters[1:]:
        if different := names ^ set(adapter.modules):
            raise ModelError(f"{min(different)} has a magnitude in one DoRA adapter only", hint=hint)
    return [
        "DoRA: directions are merged as the mode says and magnitudes averaged, which is not the mean of the weights;"
        " errors are those of the directions"
    ]


def _differ(name: str, owners: Owners, shapes: Sequence[tuple[int, ...]]) -> ModelError:
    text = ", ".join(
        f"{shape} in {adapter.where}" for shape, (adapter, _) in zip(shapes, owners, strict=True)
    )
    return ModelError(
        f"{name} has the shape {text}", hint="merge adapters of the same base and the same labels"
    )
