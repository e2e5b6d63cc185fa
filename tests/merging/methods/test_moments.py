"""Adam's second moments, as Fisher information."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from toolkit.errors import ModelError
from toolkit.merging.fisher_files import open_fisher
from toolkit.merging.methods.moments import second_moments


def trained(optimizer_class: type[torch.optim.Optimizer], steps: int, **options: object):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].bias.requires_grad_(False)
    optimizer = optimizer_class((p for p in model.parameters() if p.requires_grad), **options)
    gradients: dict[str, list[torch.Tensor]] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(name, []).append(parameter.grad.double().clone())
        optimizer.step()
    return model, optimizer, gradients


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [1, 5])
def test_without_bias(optimizer_class, steps) -> None:
    model, optimizer, gradients = trained(optimizer_class, steps, betas=(0.9, 0.98))
    fisher = second_moments(model, optimizer)
    assert fisher.tensors.keys() == {"0.weight", "1.weight", "1.bias"}
    assert fisher.num_examples == steps
    for name, tensor in fisher.tensors.items():
        shares = [0.98 ** (steps - 1 - t) for t in range(steps)]
        expected = sum(s * g**2 for s, g in zip(shares, gradients[name], strict=True)) / sum(shares)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=0)


def test_a_file_of_them_is_an_input_of_a_merge(tmp_path) -> None:
    model, optimizer, _ = trained(torch.optim.AdamW, 3)
    fisher = second_moments(model, optimizer)
    fisher.save(tmp_path / "moments.safetensors")
    with safe_open(tmp_path / "moments.safetensors", framework="pt") as stream:
        assert "Adam" in stream.metadata()["kind"]
    entry = open_fisher(tmp_path / "moments.safetensors").tensor("0.weight")
    assert entry is not None
    assert entry.norm == pytest.approx(float(fisher.tensors["0.weight"].double().norm()))


def test_other_optimizers_and_untouched_ones_are_refused() -> None:
    model, optimizer, _ = trained(torch.optim.SGD, 2, lr=0.1)
    with pytest.raises(ModelError, match="SGD holds no second moments"):
        second_moments(model, optimizer)
    with pytest.raises(ModelError, match="at least one step"):
        second_moments(model, torch.optim.Adam(model.parameters()))
