"""RegMean: the least squares solution, and the products of inputs that it needs."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from toolkit.errors import ModelError
from toolkit.merging.methods.grams import Grams, collect_grams
from toolkit.merging.methods.regmean import solved

NAME = "layer.weight"


def inputs(seed: int, rows: int = 300, size: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator)
    return (torch.randn(rows, size, generator=generator) @ mix * 10 ** torch.linspace(-3, 1, size)).double()


def grams(x: torch.Tensor) -> Grams:
    return Grams({NAME: x.mT @ x / len(x)}, len(x))


def test_the_exact_solution_is_that_of_least_squares(merge, random_models) -> None:
    models, _ = random_models(2)
    xs = [inputs(k) for k in range(2)]
    weights = [1.0, 3.0]
    # min over theta of sum_k w_k / n_k |X_k theta^T - X_k theta_k^T|^2
    scales = [(w / len(x)) ** 0.5 for w, x in zip(weights, xs, strict=True)]
    left = torch.cat([s * x for s, x in zip(scales, xs, strict=True)])
    right = torch.cat([s * x @ m.double().mT for s, x, m in zip(scales, xs, models, strict=True)])
    expected = torch.linalg.lstsq(left, right, driver="gelsd").solution.mT
    merged = merge("regmean", models, weight=weights, gram=[grams(x) for x in xs], alpha=1.0)
    torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-7)


def test_alpha_scales_what_is_off_the_diagonal(merge, random_models) -> None:
    models, _ = random_models(3)
    products = [x.mT @ x / len(x) for x in (inputs(k) for k in range(3))]
    soft = [0.7 * g + 0.3 * torch.diag(g.diagonal()) for g in products]
    expected = sum(m.double() @ g for m, g in zip(models, soft, strict=True)) @ torch.linalg.inv(sum(soft))
    merged = merge("regmean", models, gram=[Grams({NAME: g}, 1) for g in products], alpha=0.7)
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)
    diagonal = [g.diagonal() for g in products]
    by_column = sum(m.double() * d for m, d in zip(models, diagonal, strict=True)) / sum(diagonal)
    merged = merge("regmean", models, gram=[Grams({NAME: g}, 1) for g in products], alpha=0.0)
    torch.testing.assert_close(merged, by_column, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_inputs_that_no_model_has_seen_get_the_mean(merge, random_models, alpha) -> None:
    models, _ = random_models(2)
    xs = [inputs(k) for k in range(2)]
    for x in xs:
        x[:, 5] = 0
    merged = merge("regmean", models, gram=[grams(x) for x in xs], alpha=alpha)
    mean = (models[0].double() + models[1].double()) / 2
    torch.testing.assert_close(merged[:, 5], mean[:, 5], rtol=1e-12, atol=1e-12)
    assert (merged - mean)[:, 6].abs().max() > 1e-3


def test_fewer_inputs_than_columns(merge, random_models) -> None:
    """The outputs on what was seen are matched; in other directions the mean is left alone."""
    models, _ = random_models(2)
    x = inputs(0, rows=10)
    merged = merge("regmean", models, gram=[grams(x), grams(x)], alpha=1.0)
    mean = (models[0].double() + models[1].double()) / 2
    torch.testing.assert_close(x @ merged.mT, x @ mean.mT, rtol=1e-6, atol=1e-6)
    assert (merged - mean).abs().max() < 1e-3


def test_least_norm_where_the_matrix_is_singular() -> None:
    basis = torch.linalg.qr(inputs(3, rows=6, size=6)).Q
    matrix = basis[:, :4] @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).double()) @ basis[:, :4].mT
    solution = inputs(4, rows=3, size=6) @ basis[:, :4] @ basis[:, :4].mT
    assert torch.linalg.matrix_rank(matrix) == 4
    torch.testing.assert_close(solved(solution @ matrix, matrix) @ matrix, solution @ matrix)


def test_what_has_no_products_is_averaged(merge, random_models) -> None:
    weights = [1.0, 3.0]
    for shape, name in (((24, 40), "other.weight"), ((40,), NAME), ((3, 4, 40), NAME)):
        models, _ = random_models(2, shape)
        products = [grams(inputs(k)) for k in range(2)]
        merged = merge("regmean", models, weight=weights, gram=products, name=name)
        torch.testing.assert_close(merged, 0.25 * models[0].double() + 0.75 * models[1].double())


def test_one_model_without_products_means_an_average(merge, random_models) -> None:
    models, _ = random_models(2)
    merged = merge("regmean", models, gram=[grams(inputs(0)), Grams({}, 1)])
    torch.testing.assert_close(merged, (models[0].double() + models[1].double()) / 2)


def test_products_of_another_layer_are_refused(merge, random_models) -> None:
    models, _ = random_models(2)
    with pytest.raises(
        ModelError, match=r"layer\.weight has shape \(30, 30\), and the layer takes 40 inputs"
    ):
        merge("regmean", models, gram=[grams(inputs(0)), grams(inputs(1, size=30))])


def test_products_given_in_memory_are_not_changed(merge, random_models) -> None:
    models, _ = random_models(2)
    products = [grams(inputs(k)) for k in range(2)]
    before = [g.tensors[NAME].clone() for g in products]
    merge("regmean", models, gram=products)
    assert all(torch.equal(g.tensors[NAME], b) for g, b in zip(products, before, strict=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.embed(input_ids))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches():
    generator = torch.Generator().manual_seed(1)
    for size in (4, 3):
        mask = torch.ones(size, 6, dtype=torch.int64)
        mask[0, 2:] = 0
        yield {"input_ids": torch.randint(20, (size, 6), generator=generator), "attention_mask": mask}


def test_collecting_counts_the_positions_that_are_text(net) -> None:
    collected = collect_grams(net, batches())
    x = torch.cat([net.embed(b["input_ids"])[b["attention_mask"].bool()] for b in batches()]).detach()
    assert collected.num_examples == 7
    assert collected.tensors.keys() == {"first.weight", "second.weight"}  # no input reached the unused one
    torch.testing.assert_close(collected.tensors["first.weight"], x.mT @ x / len(x))
    h = torch.tanh(net.first(x)).detach()
    torch.testing.assert_close(collected.tensors["second.weight"], h.mT @ h / len(h))
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_collecting_without_a_mask_and_for_chosen_layers(net) -> None:
    plain = [{"input_ids": b["input_ids"]} for b in batches()]
    collected = collect_grams(net, plain, names=["first.weight"])
    x = torch.cat([net.embed(b["input_ids"]).flatten(0, 1) for b in plain]).detach()
    assert collected.tensors.keys() == {"first.weight"}
    torch.testing.assert_close(collected.tensors["first.weight"], x.mT @ x / len(x))


def test_collecting_nothing_is_refused_and_hooks_go_after_an_error(net) -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        collect_grams(net, batches(), names=["third.weight"])
    with pytest.raises(IndexError):
        collect_grams(net, [{"input_ids": torch.tensor([[99]])}])
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_a_file_gives_the_same_merge_and_is_read_anew(net, merge, random_models, tmp_path) -> None:
    models, _ = random_models(2)
    products = [Grams({NAME: grams(inputs(k)).tensors[NAME].float()}, 300) for k in range(3)]
    paths = [tmp_path / "a" / "grams.safetensors", tmp_path / "b" / "grams.safetensors"]
    for path, product in zip(paths, products, strict=False):
        product.save(path)
    with safe_open(paths[0], framework="pt") as stream:
        assert stream.metadata() == {"format": "meldkit-grams-1", "num_examples": "300"}
    in_memory = merge("regmean", models, gram=products[:2])
    assert torch.equal(merge("regmean", models, gram=[str(path) for path in paths]), in_memory)
    products[2].save(paths[1])
    again = merge("regmean", models, gram=[str(path) for path in paths])
    assert torch.equal(again, merge("regmean", models, gram=[products[0], products[2]]))
    assert [path.name for path in paths[1].parent.iterdir()] == ["grams.safetensors"]


def test_a_file_of_something_else_is_refused(merge, random_models, tmp_path) -> None:
    from safetensors.torch import save_file

    models, _ = random_models(2)
    save_file({NAME: torch.eye(40)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors does not hold Gram matrices"):
        merge("regmean", models, gram=[str(tmp_path / "model.safetensors")] * 2)


def test_a_merge_of_two_trained_nets_answers_better_than_the_mean(merge) -> None:
    """Two linear regressions on inputs from different directions: RegMean solves both, the mean neither."""
    truth = torch.randn(5, 40, generator=torch.Generator().manual_seed(9)).double()
    models, products, xs = [], [], []
    for k in range(2):
        x = inputs(k, rows=30)[:, :40]
        theta = torch.linalg.lstsq(x, x @ truth.mT, driver="gelsd").solution.mT
        models.append(theta)
        products.append(grams(x))
        xs.append(x)
    merged = merge("regmean", models, gram=products, alpha=1.0)
    mean = (models[0] + models[1]) / 2

    def error(theta: torch.Tensor) -> float:
        return max(float((x @ (theta - truth).mT).norm() / (x @ truth.mT).norm()) for x in xs)

    assert error(merged) < 0.01 * error(mean)
