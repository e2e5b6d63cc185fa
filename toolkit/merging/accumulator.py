"""Merging states that arrive one by one, as in federated training: sums are held, states are not."""

import numpy as np
import torch

from toolkit.errors import InputError, MergeError
from toolkit.merging.fisher_files import norm_and_mean
from toolkit.merging.group import PIECE_SIZE, MemoryReader
from toolkit.merging.states import (
    State,
    check_memory,
    copy_integers,
    one_device,
    outputs,
    same_names,
    tied,
)
from toolkit_kernels import dispatch
from toolkit_kernels.backend import Backend
from toolkit_kernels.pool import Pool
from toolkit_kernels.rules import Inputs, Piece, WeightedSum
from toolkit_kernels.spans import Span


class Accumulator:
    """A weighted mean of states that come one by one: sum_k w_k theta_k / sum_k w_k, with Fishers
    sum_k w_k F_k theta_k / sum_k w_k F_k.

    Holds float64 sums (8 bytes a parameter, 24 with Fishers) and no state. The order in which states come changes the
    result by no more than the rounding of float64, about 1e-16 of the largest term; for the same bits add them in a
    fixed order.

    Args:
        fisher_floor: smallest Fisher value, relative to the mean over its tensor.
        backend: auto, numba, torch, triton or reference.
        num_threads: on the CPU; None for one a core.
    """

    def __init__(
        self, *, fisher_floor: float = 0.0, backend: str = "auto", num_threads: int | None = None
    ) -> None:
        self._fisher_floor, self._backend, self._num_threads = fisher_floor, backend, num_threads
        self._first: dict[str, torch.Tensor] = {}
        self._means: dict[str, torch.Tensor] = {}  # sum of w_k theta_k, not yet divided
        self._fisher_sums: dict[str, torch.Tensor] = {}  # sum of w_k F_k theta_k
        self._fisher_weights: dict[str, torch.Tensor] = {}  # sum of w_k F_k
        self.total_weight = 0.0
        self.num_added = 0

    @torch.no_grad()
    def add(
        self, state: State, weight: float = 1.0, fisher: State | None = None, *, label: str | None = None
    ) -> None:
        """Add one state; it may be changed or freed afterwards.

        Args:
            state: tensors by name; names and shapes are those of the first one.
            weight: w_k >= 0, e.g. a number of examples.
            fisher: F_k >= 0 by the same names; all states come with one, or none.
            label: whose state it is, for messages.

        Raises:
            InputError: a weight that is negative or not finite, a Fisher for some states only, another device than the
                first state's.
            ModelError: other names or shapes than the first state's, or a Fisher that is negative, NaN or
                infinite.
            MergeError: the state holds NaN or infinity. Whatever is raised, the sums are as before.
        """
        who = label or f"state {self.num_added}"
        if not 0 <= weight < float("inf"):
            raise InputError(f"{who}: a weight must be finite and not negative, and is {weight}")
        if self.num_added and (fisher is not None) != bool(self._fisher_weights):
            raise InputError(f"{who}: either every state comes with a Fisher, or none")
        one_device({"the first state": self._first, who: state, f"the Fisher of {who}": fisher or {}})
        same_names(self._first or state, state, who)
        floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        if fisher is not None:
            same_names(floating, fisher, f"Fisher of {who}")
        self._refuse_non_finite(floating, who)
        floors = {
            name: self._fisher_floor * self._mean(tensor, name, who)
            for name, tensor in (fisher or {}).items()
        }
        if not self.num_added:
            self._begin(state, with_fisher=fisher is not None)
        with Pool(self._num_threads) as pool:
            for name, tensor in floating.items():
                self._add_to(self._means[name], tensor, weight, pool)
        for name, values in (fisher or {}).items():
            self._add_fisher(name, state[name], weight, values, floors[name])
        self.total_weight += weight
        self.num_added += 1

    @torch.no_grad()
    def result(self, out: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The mean so far, in the dtypes of the first state; more states can follow.

        Raises:
            InputError: nothing was added, or all weights are zero.
        """
        if not self.total_weight > 0:
            raise InputError("no state with a weight above zero has been added")
        result = outputs(self._first, out, None)
        if out is not None:
            check_memory(out, tied([{name: out[name] for name in self._first}]), {"the mean": self._means})
        copy_integers(self._first, result)
        for name, total in self._means.items():
            mean = total / self.total_weight
            if self._fisher_weights:
                weights = self._fisher_weights[name]
                mean = torch.where(weights > 0, self._fisher_sums[name] / weights, mean)
            rounding = Piece(Inputs((Span.of(mean),)), WeightedSum(np.ones(1)), Span.of(result[name]))
            if self._kernels(mean).apply([rounding])[0]:
                raise MergeError(f"{name}: the mean overflows {result[name].dtype}")
        return result

    def _begin(self, state: State, *, with_fisher: bool) -> None:
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                self._first[name] = tensor.clone()
                continue
            # Only shape, dtype and device are needed of it later: one element that all share.
            self._first[name] = tensor.new_zeros(()).expand(tensor.shape)
            for sums in (self._means, self._fisher_sums, self._fisher_weights)[: 3 if with_fisher else 1]:
                sums[name] = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)

    def _kernels(self, tensor: torch.Tensor) -> Backend:
        return dispatch.backend(self._backend, str(tensor.device))

    def _add_to(self, total: torch.Tensor, tensor: torch.Tensor, weight: float, pool: Pool) -> None:
        """total += weight * tensor, in place: the order of a weighted sum of all states at once."""
        values, sums = Span.of(tensor.contiguous()), Span.of(total)
        kernels = self._kernels(tensor)
        size = PIECE_SIZE if str(tensor.device) == "cpu" else max(values.size, 1)
        rule = WeightedSum(np.array([weight]), base_weight=1.0)

        def add(start: int) -> None:
            part = sums.part(start, size)
            kernels.apply([Piece(Inputs((values.part(start, size),), base=part, start=start), rule, part)])

        pool.map(add, range(0, values.size, size))

    def _mean(self, fisher: torch.Tensor, name: str, who: str) -> float:
        reader = MemoryReader.of(fisher, f"the Fisher of {who}")
        return norm_and_mean(reader, name, self._kernels(fisher))[1]

    def _add_fisher(
        self, name: str, tensor: torch.Tensor, weight: float, fisher: torch.Tensor, floor: float
    ) -> None:
        flat = (x.reshape(-1) for x in (tensor, fisher, self._fisher_sums[name], self._fisher_weights[name]))
        for values, importance, total, weights in zip(*(x.split(PIECE_SIZE) for x in flat), strict=True):
            weighted = importance.double().clamp_(min=floor).mul_(weight)
            weights += weighted
            total += weighted.mul_(values.double())

    def _refuse_non_finite(self, state: State, who: str) -> None:
        for name, tensor in state.items():
            if self._kernels(tensor).non_finite(Inputs((Span.of(tensor.contiguous()),)))[0]:
                raise MergeError(f"{name}: {who} holds NaN or infinity")
