"""Forward hooks that see what goes into each layer, and backward hooks that square the gradients as they arrive.

Autograd computes no gradient of a weight: the parameters are frozen, and the outputs of the layers are what it
differentiates by. A parameter that is used by several calls (tied weights, a layer applied twice) gets the sum of
their contributions per example before the square.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.merging.fisher.rules import SECOND_CHOICE, Contribution, Rule, rule_of
from toolkit.merging.fisher.squares import (
    Lookups,
    Products,
    Scratch,
    add_lookup_squares,
    add_product_squares,
    add_vector_squares,
)


@dataclass(slots=True)
class _Layer:
    """``names``: of its parameters, by their name in the layer."""

    module: nn.Module
    rule: Rule
    names: dict[str, str]


@dataclass(slots=True)
class _Call:
    """One call of a layer in the forward pass. ``version`` shows whether the input was overwritten afterwards."""

    layer: _Layer
    input: torch.Tensor
    version: int


class Recorder:
    """Adds Σ_b g_b² of a batch to ``fisher`` while its backward pass runs.

    Args:
        model: its parameters are frozen while it is in use.
        parameters: those to estimate, by name; a tied one once.
        fisher: float32 buffers by name, changed in place.

    Attributes:
        broadcasts: whether a lookup that is made once for the whole batch is repeated for each example.
        did_broadcast: whether that has happened.
        without_rule: names of parameters that belong to no layer with a rule.
        failed: names whose layers turned out not to work on one example at a time, since the last :meth:`watching`.
        reached: names whose gradient arrived, since the last :meth:`watching`.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], fisher: dict[str, torch.Tensor]
    ) -> None:
        self._fisher = fisher
        self._scratch = Scratch()
        self._layers = _layers(model, parameters)
        self.without_rule = parameters.keys() - {n for layer in self._layers for n in layer.names.values()}
        self.broadcasts, self.did_broadcast = True, False
        self.failed: set[str] = set()
        self.reached: set[str] = set()
        self._handles: list[Any] = []
        self._shape = (0, 0)
        self._num_calls: dict[str, int] = {}
        self._pending: dict[str, list[Contribution]] = {}
        self._is_watching = False

    def attach(self, skip: Iterable[str] = ()) -> None:
        """Hook every layer that has a parameter outside of ``skip``."""
        skipped = set(skip)
        for layer in self._layers:
            layer.names = {own: name for own, name in layer.names.items() if name not in skipped}
            if layer.names:
                hook = _hook_of(self, layer)
                self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def try_second_choice(self, names: set[str]) -> bool:
        """Give the layers of these parameters another rule; False where none has one."""
        has_changed = False
        for layer in self._layers:
            if layer.rule in SECOND_CHOICE and not names.isdisjoint(layer.names.values()):
                layer.rule, has_changed = SECOND_CHOICE[layer.rule], True
        return has_changed

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def watching(self, num_examples: int, num_tokens: int) -> Iterator[None]:
        """Around the forward pass of a batch of ``num_examples`` rows of ``num_tokens`` tokens; others are not seen."""
        self._shape = (num_examples, num_tokens)
        self._num_calls.clear()
        self._pending.clear()
        self.failed.clear()
        self.reached.clear()
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False

    def finish_backward(self) -> None:
        """After each backward pass: parameters some of whose calls got no gradient."""
        for name in list(self._pending):
            self.add_waiting(name)

    def add_waiting(self, name: str) -> None:
        if name in self._pending:
            self._add(name, self._pending.pop(name))

    def after_forward(
        self, layer: _Layer, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> Any:
        if not self._is_watching or not torch.is_grad_enabled():
            return None
        inputs = [v for v in (*arguments, *keywords.values()) if isinstance(v, torch.Tensor)]
        if len(inputs) != 1 or not isinstance(output, torch.Tensor):
            return None  # no gradient will be reported, and the probe will see that
        num_examples = self._shape[0]
        call = _Call(layer, inputs[0].detach(), inputs[0]._version)
        result = output
        is_shared = isinstance(layer.module, nn.Embedding) and len(inputs[0]) == 1 < num_examples
        if is_shared and self.broadcasts:
            # Positions looked up once for the whole batch: a row for each example, or their gradients are one sum.
            self.did_broadcast = True
            call.input = call.input.expand(num_examples, *call.input.shape[1:])
            result = result.expand(num_examples, *result.shape[1:])
        if not result.requires_grad:
            result = result.detach().requires_grad_().clone()  # a leaf must not be changed in place
        for name in layer.names.values():
            self._num_calls[name] = self._num_calls.get(name, 0) + 1
        result.register_hook(lambda gradient: self._after_backward(call, gradient))
        return None if result is output else result

    def _after_backward(self, call: _Call, gradient: torch.Tensor) -> None:
        layer = call.layer
        inputs = self._per_example(call.input, has_width=not isinstance(layer.module, nn.Embedding))
        gradients = self._per_example(gradient, has_width=True)
        if inputs is None or gradients is None or call.input._version != call.version:
            self.failed.update(layer.names.values())
            return
        try:
            contributions = layer.rule(layer.module, inputs, gradients.detach())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError):
            contributions = {}  # not a layer of the kind that the rule is for
        for own, name in layer.names.items():
            if own not in contributions:
                self.failed.add(name)
                continue
            pending = self._pending.setdefault(name, [])
            pending.append(contributions[own])
            if len(pending) == self._num_calls[name]:
                self._add(name, self._pending.pop(name))

    def _per_example(self, tensor: torch.Tensor, *, has_width: bool) -> torch.Tensor | None:
        """[B, T, width], or [B, T]; None where the first dimension is not the examples."""
        num_examples, num_tokens = self._shape
        width = tensor.shape[-1:] if has_width else ()
        rows = tensor.shape[: tensor.dim() - len(width)]
        if not rows or (
            num_examples > 1 and rows[0] != num_examples and rows != (num_examples * num_tokens,)
        ):
            return None
        return tensor.reshape(num_examples, -1, *width)

    @torch.no_grad()
    def _add(self, name: str, contributions: list[Contribution]) -> None:
        self.reached.add(name)
        fisher = self._fisher[name]
        products = [c for c in contributions if isinstance(c, Products)]
        lookups = [c for c in contributions if isinstance(c, Lookups)]
        vectors = [c for c in contributions if isinstance(c, torch.Tensor)]
        joined = (
            Lookups(torch.cat([c.ids_BS for c in lookups], 1), torch.cat([c.grad_BSD for c in lookups], 1))
            if lookups
            else None
        )
        if vectors:
            add_vector_squares(fisher, _joined(vectors))
        elif products:
            both = Products(
                _joined([p.grad_BTO for p in products]),
                _joined([p.input_BTI for p in products]),
                products[0].is_transposed,
            )
            add_product_squares(fisher, both, self._scratch, joined)
        elif joined is not None:
            add_lookup_squares(fisher, joined)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _hook_of(recorder: Recorder, layer: _Layer) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        return recorder.after_forward(layer, arguments, keywords, output)

    return hook


def _layers(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[_Layer]:
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    layers = []
    for module in model.modules():
        own = {
            own: name_of[id(parameter)]
            for own, parameter in module.named_parameters(recurse=False)
            if id(parameter) in name_of
        }
        rule = rule_of(module) if own else None
        if rule is not None:
            layers.append(_Layer(module, rule, own))
    return layers
