"""Merging states that are in memory, all at once.

Nothing is kept between calls: a loop of ten thousand merges sees each state as it is then.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import fsum, isfinite, sqrt
from typing import Any

import numpy as np
import torch

from toolkit.config.names import did_you_mean
from toolkit.errors import ConfigError, InputError, MeldkitError, MergeError, ModelError
from toolkit.merging.finite import num_hidden, num_in_group
from toolkit.merging.fisher_files import norm_and_mean
from toolkit.merging.group import PIECE_SIZE, FisherTensor, MemoryReader, TensorGroup
from toolkit.merging.order import call_method
from toolkit.merging.registry import MergeMethod, merge_methods
from toolkit.merging.states import (
    State,
    check_memory,
    copy_integers,
    known_dtype,
    one_device,
    outputs,
    same_names,
    tied,
)
from toolkit_kernels import dispatch, sums
from toolkit_kernels.backend import Backend
from toolkit_kernels.pool import Pool
from toolkit_kernels.rules import BLOCK, FisherMean, Piece, Rule, WeightedSum
from toolkit_kernels.spans import Span

FisherMeasures = Mapping[str, tuple[float, float]]
"""L2 norm and mean of each tensor of a Fisher."""


@torch.no_grad()
def merge_state_dicts(
    states: Sequence[State],
    method: str = "linear",
    *,
    base: State | None = None,
    fisher: Sequence[State] | None = None,
    fisher_measures: Sequence[FisherMeasures] | None = None,
    keep_order: bool = False,
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
        fisher_measures: what :func:`measure_fisher` says of K whole Fishers, where states and Fishers are parts of
            larger ones; None: of ``fisher``.
        keep_order: sum up the states as they are given, tensor by tensor and part by part alike; otherwise in an order
            of their own, which is that of no list (:mod:`toolkit.merging.order`).
        out: tensors that receive the result, e.g. of an earlier call; made where None. They may be those of a state,
            each under its name there.
        out_dtype: of the floating-point tensors of the result; None for that of the first state (or of the base).
        seed: of random masks.
        backend: auto, numba, torch, triton or reference.
        num_threads: on the CPU; None for one a core.
        on_progress: called with the bytes of each finished tensor of the result, from any thread.
        **parameters: of the method; a per-model one is a number or a list of K. ``lambda`` is written ``lambda_``.

    Returns:
        The merged state, contiguous, in the order of the first state. Sums are formed in float64 and rounded once.
        Integer tensors must be equal and are copied. Names that are one tensor in every state (tied embeddings), or in
        ``out``, are merged once, under the first of them that every Fisher has, and are one tensor in the result.

    Raises:
        InputError, ConfigError, ModelError: names, shapes, devices, dtypes or parameters do not fit, or a Fisher is
            negative or not finite; nothing was written.
        MergeError: a value of the result, or of an input of which it may hide, is NaN or infinite; ``out`` is then
            undefined.
    """
    chosen = replace(_method(method), ordered=True) if keep_order else _method(method)
    _check(states, base, chosen)
    _check_fisher(states, fisher, fisher_measures, chosen)
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    arguments = chosen.arguments(given, len(states))
    _check_numbers(arguments)
    if chosen.base_is_a_model and base is not None:
        states, base = [base, *states], None
    first = states[0] if base is None else base
    if not first:
        return {}
    device = str(next(iter(first.values())).device)
    inputs = _named(states, base, fisher)
    ties = tied([first, *states] if out is None else [{name: out.get(name, first[name]) for name in first}])
    result = outputs(first, out, out_dtype, ties)
    with Pool(num_threads if device == "cpu" else 1) as pool:
        kernels = dispatch.backend(backend, device)
        shared = (result, seed, kernels, pool, on_progress)
        merge = _Merge(chosen, arguments, states, base, fisher, fisher_measures, *shared)
        if out is not None:
            check_memory(out, ties, inputs)
            copy_integers(first, out)
        names = [max(group, key=lambda name: sum(name in each for each in fisher or ())) for group in ties]
        if device == "cpu":
            merge.on_threads(names)
        else:
            merge.in_one_launch(names)
    return result


def _named(states: Sequence[State], base: State | None, fisher: Sequence[State] | None) -> dict[str, State]:
    """All inputs by what messages call them."""
    named = {f"state {k}": state for k, state in enumerate(states)}
    named |= {} if base is None else {"base": base}
    return named | {f"Fisher {k}": tensors for k, tensors in enumerate(fisher or ())}


class _Merge:
    """One call of :func:`merge_state_dicts`, whose arguments it holds."""

    def __init__(
        self,
        method: MergeMethod,
        arguments: Mapping[str, Any],
        states: Sequence[State],
        base: State | None,
        fisher: Sequence[State] | None,
        measures: Sequence[FisherMeasures] | None,
        result: Mapping[str, torch.Tensor],
        seed: int,
        kernels: Backend,
        pool: Pool,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.method, self.arguments, self.states, self.base = method, arguments, states, base
        self.fisher = fisher
        self.measures = _measures(fisher, kernels, pool) if measures is None else measures
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
        hidden = [num_hidden(self.kernels, piece) for piece in pieces]  # before they are overwritten
        for name, count, more in zip(owners, self.kernels.apply(pieces), hidden, strict=True):
            self._refuse_non_finite(name, int(count) + more)
        for name in names:
            self._finished(name)

    def _merge(self, name: str, *, shared: bool) -> None:
        size = max(self.result[name].numel(), BLOCK)
        if shared:
            size = max(-(-size // (self.pool.num_threads * PIECE_SIZE)), 1) * PIECE_SIZE
        parallel_map = self.pool.map if shared else map
        pieces = _pieces(*self._rule(name, parallel_map), self.result[name], size)
        self._refuse_non_finite(name, sum(parallel_map(self._apply, pieces)))
        self._finished(name)

    def _apply(self, piece: Piece) -> int:
        hidden = num_hidden(self.kernels, piece)  # before it is overwritten
        return hidden + int(self.kernels.apply([piece])[0])

    def _rule(self, name: str, parallel_map: sums.Map) -> tuple[Rule | torch.Tensor, TensorGroup]:
        target = self.result[name]
        group = TensorGroup(
            name,
            tuple(target.shape),
            tuple(MemoryReader.of(state[name], f"state {k}") for k, state in enumerate(self.states)),
            None if self.base is None else MemoryReader.of(self.base[name], "base"),
            self.kernels,
            _fisher_tensors(name, self.fisher, self.measures),
            self.seed,
            parallel_map,
            str(target.device),
        )
        try:
            rule, ordered, _ = call_method(self.method, group, self.arguments)
        except MeldkitError:
            raise
        except Exception as error:
            self._refuse_non_finite(name, num_in_group(group))
            raise MergeError(f"{name}: {self.method.name} failed: {error}") from error
        if isinstance(rule, torch.Tensor):  # which may hide whatever it was computed from
            self._refuse_non_finite(name, num_in_group(group))
        return rule, ordered

    def _refuse_non_finite(self, name: str, count: int) -> None:
        if not count:
            return
        written = self.result[name].data_ptr()
        read = _named(self.states, self.base, self.fisher)
        intact = {who: state[name] for who, state in read.items() if name in state}
        intact = {who: tensor for who, tensor in intact.items() if tensor.data_ptr() != written}
        guilty = [who for who, tensor in intact.items() if not bool(tensor.isfinite().all())]
        if guilty:
            raise MergeError(f"{name}: {', '.join(guilty)} holds NaN or infinity")
        overwritten = [who for who in read if who not in intact and name in read[who]]
        other = f", unless {overwritten[0]} held some" if overwritten else ""
        raise MergeError(
            f"{name}: {count} values of the result are NaN or infinite though no input's are{other}; the sum overflows "
            "the dtype"
        )

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
    one_device(_named(states, base, None))
    for k, state in enumerate(states):
        same_names(states[0], state, f"state {k}")
    if base is not None:
        same_names(states[0], base, "base")


def _check_fisher(
    states: Sequence[State],
    fisher: Sequence[State] | None,
    measures: Sequence[FisherMeasures] | None,
    method: MergeMethod,
) -> None:
    if method.needs_fisher and fisher is None:
        raise InputError(f"{method.name} needs the Fisher of every state")
    if fisher is not None and len(fisher) != len(states):
        raise InputError(f"{len(fisher)} Fishers for {len(states)} states")
    if measures is not None and len(measures) != len(fisher or ()):
        raise InputError(f"{len(measures)} measures for {len(fisher or ())} Fishers")
    one_device({"state 0": states[0], **_named((), None, fisher)} if states else {})
    for k, tensors in enumerate(fisher or ()):
        for name, tensor in tensors.items():
            if name not in states[0]:
                raise ModelError(f"Fisher {k} has the tensor {name}, which the states have not")
            if tensor.shape != states[0][name].shape:
                raise ModelError(f"{name}: Fisher {k} has shape {tuple(tensor.shape)}, the state another")
            known_dtype(tensor, name, f"Fisher {k}")


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    problems = []
    for name, value in arguments.items():
        if isinstance(value, float) and not isfinite(value):
            problems.append(f"{name} is {value}")
        if isinstance(value, np.ndarray):
            problems += [f"{name} of state {k} is {x}" for k, x in enumerate(value) if not isfinite(x)]
    if problems:
        raise ConfigError(problems)


# --- Fisher information


@torch.no_grad()
def measure_fisher(
    fisher: State, *, backend: str = "auto", num_threads: int | None = None
) -> dict[str, tuple[float, float]]:
    """L2 norm and mean of each tensor of one Fisher.

    Raises:
        ModelError: a value is negative or not finite.
    """
    device = str(next(iter(fisher.values())).device) if fisher else "cpu"
    with Pool(num_threads if device == "cpu" else 1) as pool:
        return _measures([fisher], dispatch.backend(backend, device), pool)[0]


def _measures(
    fisher: Sequence[State] | None, kernels: Backend, pool: Pool
) -> list[dict[str, tuple[float, float]]]:
    readers = [
        (k, name, MemoryReader.of(tensor, f"Fisher {k}"))
        for k, tensors in enumerate(fisher or ())
        for name, tensor in tensors.items()
    ]
    found = pool.map(lambda entry: norm_and_mean(entry[2], entry[1], kernels), readers)
    measures: list[dict[str, tuple[float, float]]] = [{} for _ in fisher or ()]
    for (k, name, _), measure in zip(readers, found, strict=True):
        measures[k][name] = measure
    return measures


def _fisher_tensors(
    name: str, fisher: Sequence[State] | None, measures: Sequence[FisherMeasures]
) -> tuple[FisherTensor | None, ...]:
    entries: list[FisherTensor | None] = []
    for k, (tensors, known) in enumerate(zip(fisher or (), measures, strict=True)):
        if name not in tensors:
            entries.append(None)
            continue
        norm, mean = known[name]
        model_norm = sqrt(fsum(other**2 for other, _ in known.values()))
        entries.append(FisherTensor(MemoryReader.of(tensors[name], f"Fisher {k}"), mean, norm, model_norm))
    return tuple(entries)
