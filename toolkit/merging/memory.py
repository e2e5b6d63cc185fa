"""Merging states that are in memory, all at once.

Nothing is kept between calls: a loop of ten thousand merges sees each state as it is then.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from toolkit.config.names import did_you_mean
from toolkit.errors import InputError, MergeError, ModelError
from toolkit.merging.group import PIECE_SIZE, FisherTensor, MemoryReader, TensorGroup
from toolkit.merging.order import call_method
from toolkit.merging.registry import MergeMethod, merge_methods
from toolkit_kernels import dispatch, sums
from toolkit_kernels.backend import Backend
from toolkit_kernels.pool import Pool
from toolkit_kernels.rules import BLOCK, FisherMean, Inputs, Piece, Rule, WeightedSum
from toolkit_kernels.spans import Span

State = Mapping[str, torch.Tensor]


@torch.no_grad()
def merge_state_dicts(
    states: Sequence[State],
    method: str = "linear",
    *,
    base: State | None = None,
    fisher: Sequence[State] | None = None,
    out: dict[str, torch.Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
    backend: str = "auto",
    num_threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge K state dicts of the same names and shapes into one.

    Args:
        states: K states, all on one device; dtypes may differ from state to state.
        method: a name of :func:`toolkit.merging.registry.merge_methods`.
        base: theta_0, for methods that work on deltas.
        fisher: K diagonal Fishers (tensors >= 0 by name); a tensor that one of them lacks gets the plain weighted mean.
        out: tensors that receive the result, e.g. of an earlier call; made where None. They may be those of a state.
        out_dtype: of the floating-point tensors of the result; None for that of the first state (or of the base).
        seed: of random masks.
        backend: auto, numba, torch, triton or reference.
        num_threads: on the CPU; None for one a core.
        on_progress: called with the bytes of each finished tensor of the result, from any thread.
        **parameters: of the method; a per-model one is a number or a list of K. ``lambda`` is written ``lambda_``.

    Returns:
        The merged state, contiguous, in the order of the first state. Sums are formed in float64 and rounded once.
        Integer tensors must be equal and are copied.

    Raises:
        InputError, ConfigError, ModelError: names, shapes or parameters do not fit; nothing was written.
        MergeError: a value of the result is NaN or infinite; ``out`` is then undefined.
    """
    chosen = _method(method)
    _check(states, base, chosen)
    _check_fisher(states, fisher, chosen)
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    arguments = chosen.arguments(given, len(states))
    if chosen.base_is_a_model and base is not None:
        states, base = [base, *states], None
    first = states[0] if base is None else base
    if not first:
        return {}
    device = str(next(iter(first.values())).device)
    result = outputs(first, out, out_dtype)
    with Pool(num_threads if device == "cpu" else 1) as pool:
        kernels = dispatch.backend(backend, device)
        merge = _Merge(chosen, arguments, states, base, fisher, result, seed, kernels, pool, on_progress)
        names = [name for name, tensor in first.items() if tensor.is_floating_point()]
        if device == "cpu":
            merge.on_threads(names)
        else:
            merge.in_one_launch(names)
    return result


class _Merge:
    """One call of :func:`merge_state_dicts`, whose arguments it holds."""

    def __init__(
        self,
        method: MergeMethod,
        arguments: Mapping[str, Any],
        states: Sequence[State],
        base: State | None,
        fisher: Sequence[State] | None,
        result: Mapping[str, torch.Tensor],
        seed: int,
        kernels: Backend,
        pool: Pool,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.method, self.arguments, self.states, self.base = method, arguments, states, base
        self.fisher, self.norms = fisher, _fisher_norms(fisher, kernels)
        self.result, self.seed, self.kernels, self.pool = result, seed, kernels, pool
        self.on_progress = on_progress

    def on_threads(self, names: Sequence[str]) -> None:
        """A tensor that alone would keep the other threads waiting is shared among them; the others are whole."""
        total = sum(self.result[name].numel() for name in names)
        wide = [name for name in names if self.result[name].numel() * 4 * self.pool.num_threads > total]
        for name in wide:
            self._merge(name, shared=True)
        whole = sorted(set(names) - set(wide), key=lambda name: -self.result[name].numel())
        self.pool.map(lambda name: self._merge(name, shared=False), whole)

    def in_one_launch(self, names: Sequence[str]) -> None:
        """On a GPU the whole state dict is one list of pieces: kernels launch once for all of them."""
        pieces: list[Piece] = []
        owners: list[str] = []
        for name in names:
            size = max(self.result[name].numel(), BLOCK)
            for piece in _pieces(*self._rule(name, map), self.result[name], size):
                pieces.append(piece)
                owners.append(name)
        for name, count in zip(owners, self.kernels.apply(pieces), strict=True):
            _refuse_non_finite(int(count), name, self.states, self.base)
        for name in names:
            self._finished(name)

    def _merge(self, name: str, *, shared: bool) -> None:
        size = max(self.result[name].numel(), BLOCK)
        if shared:
            size = max(-(-size // (self.pool.num_threads * PIECE_SIZE)), 1) * PIECE_SIZE
        rule, group = self._rule(name, self.pool.map if shared else map)
        pieces = _pieces(rule, group, self.result[name], size)
        counts = (self.pool.map if shared else map)(lambda piece: self.kernels.apply([piece])[0], pieces)
        _refuse_non_finite(sum(int(count) for count in counts), name, self.states, self.base)
        self._finished(name)

    def _rule(self, name: str, parallel_map: sums.Map) -> tuple[Rule | torch.Tensor, TensorGroup]:
        target = self.result[name]
        group = TensorGroup(
            name,
            tuple(target.shape),
            tuple(MemoryReader.of(state[name], f"state {k}") for k, state in enumerate(self.states)),
            None if self.base is None else MemoryReader.of(self.base[name], "base"),
            self.kernels,
            _fisher_tensors(name, self.fisher, self.norms),
            self.seed,
            parallel_map,
            str(target.device),
        )
        rule, group, _ = call_method(self.method, group, self.arguments)
        return rule, group

    def _finished(self, name: str) -> None:
        if self.on_progress is not None:
            self.on_progress(self.result[name].numel() * self.result[name].element_size())


def _pieces(rule: Rule | torch.Tensor, group: TensorGroup, target: torch.Tensor, size: int) -> list[Piece]:
    whole = Span.of(target)
    if isinstance(rule, torch.Tensor):  # computed as a whole: what is left is the rounding
        group = TensorGroup(group.name, group.shape, (MemoryReader.of(rule, "merged"),), None, group.backend)
        rule = WeightedSum(np.ones(1))
    inputs = group.pieces(base=True, fisher=isinstance(rule, FisherMean), size=size)
    return [Piece(part, rule, whole.part(part.start, part.size)) for part in inputs]


def _method(name: str) -> MergeMethod:
    methods = merge_methods()
    if name not in methods:
        raise InputError(
            f"no merge method {name!r}{did_you_mean(name, methods)}", hint=f"there are {', '.join(methods)}"
        )
    return methods[name]


def _check(states: Sequence[State], base: State | None, method: MergeMethod) -> None:
    fewest, most = method.num_models
    if len(states) < fewest or (most is not None and len(states) > most):
        wanted = (
            f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
        )
        raise InputError(f"{method.name} merges {wanted} models, and {len(states)} were given")
    if method.base == "required" and base is None:
        raise InputError(f"{method.name} needs a base")
    if method.base == "none" and base is not None:
        raise InputError(f"{method.name} takes no base")
    for k, state in enumerate(states):
        same_names(states[0], state, f"state {k}")
    if base is not None:
        same_names(states[0], base, "base")
    devices = {tensor.device for state in [*states, base or {}] for tensor in state.values()}
    if len(devices) > 1:
        raise InputError(f"the states lie on {', '.join(sorted(map(str, devices)))}; move them to one device")


def _check_fisher(states: Sequence[State], fisher: Sequence[State] | None, method: MergeMethod) -> None:
    if method.needs_fisher and fisher is None:
        raise InputError(f"{method.name} needs the Fisher of every state")
    if fisher is not None and len(fisher) != len(states):
        raise InputError(f"{len(fisher)} Fishers for {len(states)} states")
    for k, tensors in enumerate(fisher or ()):
        for name, tensor in tensors.items():
            if name not in states[0]:
                raise ModelError(f"Fisher {k} has the tensor {name}, which the states have not")
            if tensor.shape != states[0][name].shape:
                raise ModelError(f"{name}: Fisher {k} has shape {tuple(tensor.shape)}, the state another")


def same_names(first: State, state: State, who: str) -> None:
    """Raises ModelError unless ``state`` has the names, shapes and (of integers) values of ``first``."""
    missing, extra = sorted(first.keys() - state.keys()), sorted(state.keys() - first.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]} too"
        raise ModelError(f"{who} {what}: {len(missing)} tensors missing, {len(extra)} foreign")
    for name, tensor in first.items():
        other = state[name]
        if other.shape != tensor.shape:
            raise ModelError(f"{name}: {who} has shape {tuple(other.shape)}, the first {tuple(tensor.shape)}")
        if other.is_floating_point() != tensor.is_floating_point():
            raise ModelError(f"{name}: {who} has {other.dtype}, the first {tensor.dtype}")
        if not tensor.is_floating_point() and not torch.equal(tensor, other):
            raise ModelError(
                f"{name}: {tensor.dtype} is not averaged, and {who} has other values than the first"
            )


def outputs(
    first: State, out: dict[str, torch.Tensor] | None, out_dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Tensors for a result like ``first``: those of ``out`` after a check, or new ones. Integers are copied."""
    if out is None:
        return {
            name: torch.empty_like(tensor, dtype=out_dtype, memory_format=torch.contiguous_format)
            if tensor.is_floating_point()
            else tensor.clone()
            for name, tensor in first.items()
        }
    for name, tensor in first.items():
        target = out.get(name)
        dtype = out_dtype if out_dtype is not None and tensor.is_floating_point() else tensor.dtype
        if (
            target is None
            or target.shape != tensor.shape
            or target.dtype != dtype
            or not target.is_contiguous()
        ):
            raise InputError(
                f"out[{name!r}] must be a contiguous {dtype} tensor of shape {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            target.copy_(tensor)
    return out


def _fisher_norms(fisher: Sequence[State] | None, kernels: Backend) -> list[dict[str, float]]:
    """L2 norm of each tensor of each Fisher."""
    return [{name: _norm(tensor, kernels) for name, tensor in tensors.items()} for tensors in fisher or ()]


def _norm(tensor: torch.Tensor, kernels: Backend) -> float:
    whole = Span.of(tensor.contiguous())
    return float(kernels.gram(Inputs((whole,)))[0, 0]) ** 0.5 if whole.size else 0.0


def _fisher_tensors(
    name: str, fisher: Sequence[State] | None, norms: Sequence[Mapping[str, float]]
) -> tuple[FisherTensor | None, ...]:
    entries: list[FisherTensor | None] = []
    for k, (tensors, tensor_norms) in enumerate(zip(fisher or (), norms, strict=True)):
        if name not in tensors:
            entries.append(None)
            continue
        mean = tensors[name].double().mean().item() if tensors[name].numel() else 0.0
        model_norm = sum(norm**2 for norm in tensor_norms.values()) ** 0.5
        reader = MemoryReader.of(tensors[name], f"Fisher {k}")
        entries.append(FisherTensor(reader, mean, tensor_norms[name], model_norm))
    return tuple(entries)


def _refuse_non_finite(count: int, name: str, states: Sequence[State], base: State | None) -> None:
    if not count:
        return
    named = [*((f"state {k}", state) for k, state in enumerate(states)), *([("base", base)] if base else [])]
    guilty = [who for who, state in named if not bool(state[name].isfinite().all())]
    if guilty:
        raise MergeError(f"{name}: {', '.join(guilty)} holds NaN or infinity")
    raise MergeError(
        f"{name}: {count} values of the result are NaN or infinite though no input's are; the sum overflows the dtype"
    )
