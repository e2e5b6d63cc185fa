"""The fused loss against float64, and against what transformers computes."""

import pytest
import torch

from toolkit.training.fused_loss import ROWS_AT_A_TIME, LinearCrossEntropy, fused_loss, head_of


def reference(hidden, weight, targets):
    """Loss and both gradients in float64, by torch's cross_entropy on whole logits."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("num_tokens", [1, ROWS_AT_A_TIME, 2 * ROWS_AT_A_TIME + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_float64(num_tokens, dtype, tolerance):
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 24, dtype=dtype, requires_grad=True)
    weight = (torch.randn(101, 24) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(101, (num_tokens,))
    (LinearCrossEntropy.apply(hidden, weight, targets) * 0.5).backward()
    loss, hidden_gradient, weight_gradient = reference(hidden, weight, targets)
    made = LinearCrossEntropy.apply(hidden, weight, targets)
    assert abs(float(made) / float(loss) - 1) < tolerance
    for mine, theirs in ((hidden.grad, hidden_gradient), (weight.grad, weight_gradient)):
        assert (mine.double() - 0.5 * theirs).abs().max() < tolerance * theirs.abs().max()


def test_nothing_labelled_is_a_loss_of_zero_with_gradients_of_zero(make_model):
    model = make_model()
    ids = torch.arange(4, 14)[None]
    loss = fused_loss(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)}, 7)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


def test_the_loss_of_a_batch_is_the_models_own(make_model):
    model = make_model()
    ids = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = -100
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ours = fused_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels}, None)
    ours.backward()
    assert abs(float(ours.detach()) / float(own.detach()) - 1) < 1e-6
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-7), name


def test_a_head_with_more_than_a_product_has_no_fused_loss(make_model):
    model = make_model()
    assert head_of(model) is model.lm_head
    model.set_output_embeddings(torch.nn.Linear(32, 64, bias=True))
    assert head_of(model) is None
