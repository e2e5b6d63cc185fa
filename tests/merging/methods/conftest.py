"""Merging one tensor that is in memory, as a whole or in small pieces, without rounding the result."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from toolkit.merging.group import FisherTensor, MemoryReader, TensorGroup
from toolkit.merging.registry import merge_methods
from toolkit_kernels import dispatch
from toolkit_kernels.backend import Backend
from toolkit_kernels.rules import FisherMean, Piece
from toolkit_kernels.spans import Span

Tensor = torch.Tensor
Merge = Callable[..., Tensor]


def fisher_tensor(values: Tensor, model_norm: float | None) -> FisherTensor:
    wide = values.double()
    norm = float(wide.norm())
    mean = float(wide.mean()) if values.numel() else 0.0
    return FisherTensor(
        MemoryReader.of(values, "fisher"), mean, norm, norm if model_norm is None else model_norm
    )


def make_group(
    models: Sequence[Tensor],
    base: Tensor | None = None,
    fisher: Sequence[Tensor | None] = (),
    *,
    model_norms: Sequence[float] | None = None,
    name: str = "layer.weight",
    seed: int = 0,
    backend: Backend | None = None,
) -> TensorGroup:
    norms = model_norms or [None] * len(fisher)
    return TensorGroup(
        name,
        tuple(models[0].shape),
        tuple(MemoryReader.of(model, f"model {k}") for k, model in enumerate(models)),
        None if base is None else MemoryReader.of(base, "base"),
        backend or dispatch.backend("torch"),
        tuple(None if f is None else fisher_tensor(f, n) for f, n in zip(fisher, norms, strict=True)),
        seed,
    )


@pytest.fixture(scope="session")
def group_of() -> Callable[..., TensorGroup]:
    return make_group


@pytest.fixture(scope="session")
def merge() -> Merge:
    """``merge(method, models, base=None, fisher=(), **parameters)``: the merged tensor in float64, not rounded.

    A base that is one of the models (slerp) is given as ``base`` too.
    """

    def run(
        method: str,
        models: Sequence[Tensor],
        base: Tensor | None = None,
        fisher: Sequence[Tensor | None] = (),
        *,
        model_norms: Sequence[float] | None = None,
        name: str = "layer.weight",
        seed: int = 0,
        piece_size: int | None = None,
        **parameters: Any,
    ) -> Tensor:
        chosen = merge_methods()[method]
        arguments = chosen.arguments(
            {key.rstrip("_"): value for key, value in parameters.items()}, len(models)
        )
        if chosen.base_is_a_model and base is not None:
            models, base = [base, *models], None
        group = make_group(models, base, fisher, model_norms=model_norms, name=name, seed=seed)
        result = chosen.function(group, **arguments)
        if isinstance(result, torch.Tensor):
            assert result.shape == group.shape
            return result.double()
        out = torch.zeros(group.shape, dtype=torch.float64)
        whole = Span.of(out)
        inputs = group.pieces(
            base=True, fisher=isinstance(result, FisherMean), size=piece_size or max(group.size, 1024)
        )
        group.backend.apply([Piece(part, result, whole.part(part.start, part.size)) for part in inputs])
        return out

    return run


@pytest.fixture(scope="session")
def random_models() -> Callable[..., tuple[list[Tensor], Tensor]]:
    """``random_models(K, shape, seed, dtype)``: K models near a base, and the base."""

    def make(
        count: int = 3, shape: tuple[int, ...] = (24, 40), seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(shape, generator=generator)
        models = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
        return [model.to(dtype) for model in models], base.to(dtype)

    return make
