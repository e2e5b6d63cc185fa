"""The true Fisher information against its definition, an expectation over the model's own labels."""

import pytest
import torch

from toolkit.merging.fisher import MAX_EXACT_CLASSES, estimate_fisher
from toolkit.merging.fisher.likelihood import draw_targets

CLASSIFICATION = "sequence-classification"


def expectation(model, examples) -> dict[str, torch.Tensor]:
    """Mean over examples of Σ_y p(y|x) (∇ log p(y|x))², with one backward pass for each label."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in examples:
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits.log_softmax(-1)[0]
        for value in log_p:
            gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] += value.exp().detach() * gradient**2
    return {name: tensor / len(examples) for name, tensor in total.items()}


def test_few_classes_are_summed_exactly(build, rows, assert_equal_fisher) -> None:
    model, examples = build("xlm-r"), rows(CLASSIFICATION)
    fisher = estimate_fisher(model, examples, task=CLASSIFICATION, kind="true", batch_size=3)
    assert fisher.kind == "true"
    assert_equal_fisher(fisher.tensors, expectation(model, examples))


def test_the_labels_of_the_data_do_not_matter(build, rows, assert_equal_fisher) -> None:
    model, examples = build("xlm-r"), rows(CLASSIFICATION)
    other = [row | {"labels": 0} for row in examples]
    found = [estimate_fisher(model, r, task=CLASSIFICATION, kind="true") for r in (examples, other)]
    assert_equal_fisher(found[0].tensors, found[1].tensors)


def test_slow_parameters_take_the_same_targets(build, rows, loop) -> None:
    """A language model's drawn labels are the same in the batch and in the passes of single examples."""
    model, examples = build("mixtral"), rows("causal-lm")
    once, again = (
        estimate_fisher(model, examples, task="causal-lm", kind="true", batch_size=size, seed=3)
        for size in (1, 4)
    )
    for name, tensor in once.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-3, atol=1e-5 * tensor.max().item())
    empirical = loop(model, examples, "causal-lm")
    assert any(not torch.allclose(once.tensors[name], empirical[name], rtol=0.1) for name in empirical)


@pytest.mark.parametrize("task", [CLASSIFICATION, "causal-lm"])
def test_draws_depend_on_the_seed_and_not_on_the_batch(task, build, rows, assert_equal_fisher) -> None:
    num_classes = MAX_EXACT_CLASSES + 4
    model = build("xlm-r", num_labels=num_classes) if task == CLASSIFICATION else build("llama")
    examples = rows(task, num_classes=num_classes)

    def drawn(seed: int, batch_size: int) -> dict[str, torch.Tensor]:
        found = estimate_fisher(model, examples, task=task, kind="true", seed=seed, batch_size=batch_size)
        return found.tensors

    first = drawn(0, 2)
    assert_equal_fisher(drawn(0, 7), first)
    other = drawn(1, 2)
    assert any(not torch.allclose(other[name], first[name], rtol=0.1) for name in first)


def test_examples_are_drawn_independently() -> None:
    names = [str(number) for number in range(400)]
    logits, labels = torch.zeros(400, 10), torch.zeros(400, dtype=torch.int64)
    logits[:, 3] = -torch.inf
    (target,) = draw_targets(logits, labels, task=CLASSIFICATION, kind="true", seed=0, examples=names)
    counts = torch.bincount(target.labels, minlength=10)
    assert counts[3] == 0
    others = counts[torch.arange(10) != 3]
    assert 20 < others.min() <= others.max() < 75  # 44 expected, four standard deviations


def test_the_mean_of_many_draws_is_the_expectation(build, rows) -> None:
    model = build("xlm-r", num_labels=MAX_EXACT_CLASSES + 4)
    model.roberta.requires_grad_(False)
    examples = rows(CLASSIFICATION, number=3, num_classes=MAX_EXACT_CLASSES + 4)
    num_draws = 300
    total = torch.zeros_like(model.classifier.out_proj.bias)
    for seed in range(num_draws):
        found = estimate_fisher(model, examples, task=CLASSIFICATION, kind="true", seed=seed)
        total += found.tensors["classifier.out_proj.bias"]
    model.roberta.requires_grad_(True)
    probabilities = torch.stack(
        [model(input_ids=torch.tensor([r["input_ids"]])).logits.softmax(-1)[0] for r in examples]
    )
    # ∂ log p(y) / ∂ bias_c = [y = c] − p_c, whose second moment is p_c (1 − p_c)
    expected = (probabilities * (1 - probabilities)).mean(0)
    # five standard errors of a mean of squares that lie in [0, 1]
    torch.testing.assert_close(total / num_draws, expected, rtol=0, atol=5 * (0.25 / (3 * num_draws)) ** 0.5)
