"""The sums Σ_b g_b²: batches through the hooks where those are exact, single examples where they are not."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import nn

from toolkit.errors import MergeError, ModelError
from toolkit.merging.fisher.batches import Batch
from toolkit.merging.fisher.frozen import differentiated_by
from toolkit.merging.fisher.likelihood import Kind, Target, Task, check_outputs, draw_targets, log_likelihoods
from toolkit.merging.fisher.probe import parameters_to_avoid
from toolkit.merging.fisher.recorder import Recorder

OnProgress = Callable[[int, int], None]
"""Called with the number of examples done and of all."""


class BatchEstimator:
    """The sums over batches, and which way each parameter takes.

    Args:
        model: in evaluation mode.
        parameters: to estimate, by name.
        batches: all of them.
        task, kind, seed: as in :func:`~toolkit.merging.fisher.estimate_fisher`.

    Attributes:
        fisher: Σ_b g_b² by parameter.
        slow: parameters that are differentiated one example at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        batches: list[Batch],
        task: Task,
        kind: Kind = "empirical",
        seed: int = 0,
    ) -> None:
        self._model, self._parameters, self._batches = model, parameters, batches
        self._task: Task = task
        self._kind: Kind = kind
        self._seed = seed
        self._device = next(iter(model.parameters())).device
        self.fisher = {
            name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()
        }
        self.slow: set[str] = set()
        self._recorder = Recorder(model, parameters, self.fisher)

    def add_all(self, on_progress: OnProgress | None) -> None:
        """Sum over all batches.

        Raises:
            ModelError: no gradient reaches any parameter.
            MergeError: a log-likelihood or a gradient is not finite.
        """
        try:
            self.choose_paths()
            while not self._pass_over_data(on_progress):
                for tensor in self.fisher.values():
                    tensor.zero_()
        finally:
            self._recorder.detach()
        sums = [tensor.sum(dtype=torch.float64).item() for tensor in self.fisher.values()]
        if not all(map(math.isfinite, sums)):
            self._blame()
        if not any(sums):
            raise ModelError(
                "no gradient reaches a parameter that requires one", hint="is an adapter merged or off?"
            )

    def choose_paths(self) -> None:
        """Hook the layers, and find out by a pair of the examples for which parameters that is enough."""
        self._recorder.attach()
        pair = self._pair()
        arguments = (self._model, self._parameters, self._recorder, self.fisher, pair)
        try:
            avoid = parameters_to_avoid(*arguments, self._first_log_likelihood)
        except (RuntimeError, ValueError):
            if not self._recorder.did_broadcast:
                raise
            self._recorder.broadcasts = False
            avoid = parameters_to_avoid(*arguments, self._first_log_likelihood)
        if self._recorder.try_second_choice(avoid):
            avoid = parameters_to_avoid(*arguments, self._first_log_likelihood)
        self._avoid(avoid)

    def _pair(self) -> Batch:
        """Two rows of one batch, of different length where there are such."""
        batch = max(self._batches, key=lambda b: (len(b) > 1, b.num_tokens))
        return batch.select([0, len(batch) - 1]).to(self._device)

    def _first_log_likelihood(self, pair: Batch) -> torch.Tensor:
        logits = self._logits(pair)
        return log_likelihoods(logits, Target(pair.labels), self._task)[0]

    def _avoid(self, names: set[str]) -> None:
        self.slow |= names
        self._recorder.detach()
        self._recorder.attach(self.slow)

    def _pass_over_data(self, on_progress: OnProgress | None) -> bool:
        """Add up all batches. False where hooks failed that had worked so far; they are then avoided."""
        num_done, num_total = 0, sum(map(len, self._batches))
        for batch in self._batches:
            if not self.add(batch.to(self._device)):
                return False
            num_done += len(batch)
            if on_progress is not None:
                on_progress(num_done, num_total)
        return True

    def add(self, batch: Batch) -> bool:
        """Add one batch on the model's device. False where the sums must begin again, another way."""
        targets = self._add_batch(batch)
        if self._recorder.failed:
            self._avoid(set(self._recorder.failed))
            return False
        if self.slow:
            self._add_one_by_one(batch, targets)
        return True

    def _add_batch(self, batch: Batch) -> list[Target]:
        """One forward pass, and one backward pass a target, through the hooks."""
        recorder = self._recorder
        with differentiated_by(self._model, ()):
            with recorder.watching(len(batch), batch.num_tokens):
                logits = self._logits(batch)
            targets = self._targets(logits, batch)
            for number, target in enumerate(targets):
                values_B = log_likelihoods(logits, target, self._task)
                self._check(values_B, batch)
                if values_B.requires_grad:
                    values_B.sum().backward(retain_graph=number + 1 < len(targets))
                recorder.finish_backward()
        return targets

    def _add_one_by_one(self, batch: Batch, targets: list[Target]) -> None:
        """The parameters that the hooks cannot do: a forward and backward pass for each example."""
        parameters = {name: self._parameters[name] for name in self.slow}
        for row in range(len(batch)):
            gradients = self._gradients(batch, targets, row, parameters)
            for name, gradient in gradients:
                wide = gradient.float()
                self.fisher[name].addcmul_(wide, wide)

    def _gradients(
        self, batch: Batch, targets: list[Target], row: int, parameters: dict[str, nn.Parameter]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        alone = batch.select([row])
        columns = batch.columns(row)
        with differentiated_by(self._model, parameters.values()):
            logits = self._logits(alone)
            for number, target in enumerate(targets):
                value = log_likelihoods(logits, target.row(row, columns), self._task)[0]
                if not value.requires_grad:
                    return
                found = torch.autograd.grad(
                    value,
                    list(parameters.values()),
                    retain_graph=number + 1 < len(targets),
                    allow_unused=True,
                )
                yield from ((n, g) for n, g in zip(parameters, found, strict=True) if g is not None)

    def _logits(self, batch: Batch) -> torch.Tensor:
        keywords = {"use_cache": False} if self._task == "causal-lm" else {}
        outputs = self._model(**batch.inputs, **keywords)
        return check_outputs(cast(Mapping[str, object], outputs), batch.labels, self._task)

    def _targets(self, logits: torch.Tensor, batch: Batch) -> list[Target]:
        return draw_targets(
            logits,
            batch.labels,
            task=self._task,
            kind=self._kind,
            seed=self._seed,
            examples=batch.examples,
        )

    def _check(self, values_B: torch.Tensor, batch: Batch) -> None:
        finite = values_B.detach().isfinite()
        if not bool(finite.all()):
            name = batch.examples[finite.tolist().index(False)]
            raise MergeError(
                f"example {name}: the log-likelihood is not finite",
                hint="the model has overflowed: look at that example and at the model's weights",
            )

    def _blame(self) -> None:
        """Find the example whose gradients made a sum infinite or NaN. Slow, and the run has failed anyhow."""
        self._recorder.detach()
        for batch in self._batches:
            batch = batch.to(self._device)
            with torch.no_grad():
                targets = self._targets(self._logits(batch), batch)
            for row, example in enumerate(batch.examples):
                for name, gradient in self._gradients(batch, targets, row, self._parameters):
                    if not bool(gradient.float().square().isfinite().all()):
                        raise MergeError(f"example {example}: the gradient of {name} is not finite")
        raise MergeError("the sum of the squared gradients is not finite, though those of each example are")
