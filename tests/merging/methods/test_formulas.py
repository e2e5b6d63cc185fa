"""Each method against its formula, written out in float64 without a kernel, a block or a Gram matrix."""

import math

import numpy as np
import pytest
import torch

from toolkit.merging.methods.della import probabilities
from toolkit_kernels.philox import key_of, random_words

# Results are float64 that has not been rounded; what torch computes in blocks is rounded to float32 once.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
FLOAT32 = {"rtol": 1.2e-7, "atol": 1e-12}
W = [0.5, 1.5, 0.7]


def wide(tensors):
    return [tensor.double() for tensor in tensors]


def largest(delta, count):
    """The mask of the ``count`` largest magnitudes."""
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[delta.abs().flatten().float().argsort(descending=True, stable=True)[:count]] = True
    return mask.view(delta.shape)


def elected(vectors, weights, normalize):
    sign = torch.where(sum(vectors) >= 0, 1.0, -1.0)
    total = sum(torch.where(v.sign() == sign, v, 0) for v in vectors)
    divisor = sum(w * (v.sign() == sign).double() for v, w in zip(vectors, weights, strict=True))
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(merge, random_models, normalize) -> None:
    models, _ = random_models()
    expected = sum(w * m for w, m in zip(W, wide(models), strict=True)) / (sum(W) if normalize else 1)
    torch.testing.assert_close(merge("linear", models, weight=W, normalize=normalize), expected, **EXACT)


def test_passthrough(merge, random_models) -> None:
    (model,), _ = random_models(1)
    assert torch.equal(merge("passthrough", [model]), model.double())
    torch.testing.assert_close(merge("passthrough", [model], scale=0.5), model.double() / 2, **EXACT)


@pytest.mark.parametrize("t", [0.0, 0.05, 0.1, 10.0])
def test_nearswap(merge, random_models, t) -> None:
    (model,), base = random_models(1)
    delta = model.double() - base.double()
    expected = base.double() + delta.sign() * delta.abs().clamp(max=t)
    torch.testing.assert_close(merge("nearswap", [model], base, t=t), expected, **EXACT)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_moves_along_the_arc(merge, t) -> None:
    generator = torch.Generator().manual_seed(1)
    first, other = (torch.randn(50, 30, generator=generator) for _ in range(2))
    a, b = first.double(), 2 * other.double()
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    expected = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    torch.testing.assert_close(merge("slerp", [2 * other], first, t=t), expected, **EXACT)


def test_slerp_is_a_line_where_the_arc_is_one(merge) -> None:
    base = torch.randn(40)
    near = base + 0.001 * torch.randn(40)
    for other in (near, -base, torch.zeros(40)):
        expected = 0.7 * base.double() + 0.3 * other.double()
        torch.testing.assert_close(merge("slerp", [other], base, t=0.3), expected, **EXACT)


@pytest.mark.parametrize("with_base", [True, False])
def test_nuslerp(merge, random_models, with_base) -> None:
    models, base = random_models(2)
    origin = base.double() if with_base else torch.zeros(base.shape).double()
    a, b = (m - origin for m in wide(models))
    t = 0.75
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    expected = origin + (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    merged = merge("nuslerp", models, base if with_base else None, weight=[1.0, 3.0])
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("along_first", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (6, 5, 7), (30,), ()])
def test_nuslerp_vector_by_vector(merge, random_models, with_base, along_first, shape, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.merging.methods.rows.BLOCK_ELEMENTS", 100)
    models, base = random_models(2, shape, dtype=torch.float64)
    origin = base if with_base else torch.zeros(shape).double()
    a, b = (m - origin for m in models)
    vectors_a, vectors_b = (
        (x.movedim(0, -1) if along_first and x.dim() > 1 else x).reshape(
            -1, x.shape[0 if along_first else -1]
        )
        if shape
        else x.view(1, 1)
        for x in (a, b)
    )
    mixed = torch.empty_like(vectors_a)
    for row, (x, y) in enumerate(zip(vectors_a, vectors_b, strict=True)):
        cosine = float(x @ y / (x.norm() * y.norm()))
        if abs(cosine) > 1 - 1e-12:
            mixed[row] = 0.25 * x + 0.75 * y
        else:
            angle = math.acos(cosine)
            mixed[row] = (math.sin(0.25 * angle) * x + math.sin(0.75 * angle) * y) / math.sin(angle)
    if along_first and len(shape) > 1:
        mixed = mixed.view(*shape[1:], shape[0]).movedim(-1, 0)
    merged = merge(
        "nuslerp",
        models,
        base if with_base else None,
        weight=[1.0, 3.0],
        nuslerp_flatten=False,
        nuslerp_row_wise=along_first,
    )
    torch.testing.assert_close(merged, origin + mixed.reshape(shape), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_with_its_step_through_the_tangent_space(
    merge, random_models, with_base, normalize
) -> None:
    models, base = random_models()
    origin = base.double() if with_base else torch.zeros(base.shape).double()
    weights = [w / sum(W) for w in W] if normalize else W
    deltas = [m - origin for m in wide(models)]
    units = [d / (d.norm() + 1e-8) for d in deltas]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    length = tangent.norm() + 1e-300
    point = torch.cos(length) * mean + torch.sin(length) * tangent / length
    expected = origin + point * sum(w * d.norm() for w, d in zip(weights, deltas, strict=True))
    merged = merge("multislerp", models, base if with_base else None, weight=W, normalize_weights=normalize)
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-11)


def test_karcher_by_steps_in_the_whole_space(merge) -> None:
    generator = torch.Generator().manual_seed(3)
    models = [torch.randn(200, generator=generator) for _ in range(4)]
    models[3] = models[3] - models[0]
    alphas = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    units = [m / m.norm() for m in wide(models)]
    mean = sum(a * u for a, u in zip(alphas, units, strict=True))
    mean = mean / mean.norm()
    for _ in range(3):
        step = torch.zeros(200).double()
        for alpha, unit in zip(alphas, units, strict=True):
            angle = torch.acos((mean * unit).sum())
            step += alpha * angle / torch.sin(angle) * (unit - (mean * unit).sum() * mean)
        mean = torch.cos(step.norm()) * mean + torch.sin(step.norm()) * step / step.norm()
    expected = mean * sum(a * m.norm() for a, m in zip(alphas, wide(models), strict=True))
    merged = merge("karcher", models, weight=alphas.tolist(), max_iter=3, tol=1e-12)
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-10)
    # The mean is where the pulls balance: further steps change nothing.
    settled = merge("karcher", models, weight=alphas.tolist(), max_iter=100, tol=1e-7)
    pulls = torch.zeros(200).double()
    direction = settled / settled.norm()
    for alpha, unit in zip(alphas, units, strict=True):
        angle = torch.acos((direction * unit).sum())
        pulls += alpha * angle / torch.sin(angle) * (unit - (direction * unit).sum() * direction)
    assert pulls.norm() < 1e-6


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(merge, random_models, normalize) -> None:
    models, base = random_models()
    m = sum(w * (x - base.double()) for w, x in zip(W, wide(models), strict=True))
    expected = base.double() + 0.6 * m / (sum(W) if normalize else 1)
    merged = merge("task_arithmetic", models, base, weight=W, normalize=normalize, lambda_=0.6)
    torch.testing.assert_close(merged, expected, **EXACT)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [[0.2, 0.5, 1.0], [0.0, 0.0001, 0.3], [1.0, 1.0, 1.0]])
def test_ties(merge, random_models, normalize, density) -> None:
    models, base = random_models()
    vectors = []
    for w, model, share in zip(W, wide(models), density, strict=True):
        delta = model - base.double()
        count = max(1, int(share * delta.numel())) if share else 0
        vectors.append(w * torch.where(largest(delta, count), delta, 0))
    expected = base.double() + 0.8 * elected(vectors, W, normalize)
    merged = merge("ties", models, base, weight=W, density=density, normalize=normalize, lambda_=0.8)
    torch.testing.assert_close(merged, expected, **EXACT)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.95, 0.2), (0.3, 0.0), (1.0, 0.1), (0.0, 0.1)])
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("normalize", [True, False])
def test_breadcrumbs(merge, random_models, density, gamma, method, normalize) -> None:
    models, base = random_models()
    size = base.numel()
    vectors = []
    for w, model in zip(W, wide(models), strict=True):
        delta = model - base.double()
        keep = torch.ones(base.shape, dtype=torch.bool)
        if density < 1:
            count = int(density * size)
            top = min(int(gamma * size), size - count)
            keep = largest(delta, top + count) & ~largest(delta, top)
            assert keep.sum() == count
        vectors.append(w * torch.where(keep, delta, 0))
    merged = merge(
        method, models, base, weight=W, density=density, gamma=gamma, normalize=normalize, lambda_=0.5
    )
    mean = sum(vectors) / (sum(W) if normalize else 1)
    mixed = mean if method == "breadcrumbs" else elected(vectors, W, normalize)
    torch.testing.assert_close(merged, base.double() + 0.5 * mixed, **EXACT)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_random_methods_by_their_random_words(merge, random_models, method, normalize, rescale) -> None:
    models, base = random_models(dtype=torch.float64)
    density, epsilon = [0.3, 0.6, 1.0], [0.1, 0.2, 0.5]
    vectors = []
    for k, (w, model) in enumerate(zip(W, models, strict=True)):
        delta = model - base
        p = torch.full(base.shape, density[k], dtype=torch.float64)
        if method.startswith("della") and density[k] < 1:
            ranks = delta.abs().argsort(dim=1).argsort(dim=1)
            p = density[k] - epsilon[k] + 2 * epsilon[k] * ranks.double() / (base.shape[1] - 1)
        words = random_words(key_of(3, "layer.weight"), k, 0, delta.numel()).astype(np.float64)
        mask = torch.from_numpy(words).view(base.shape) / 2**32 < p
        vectors.append(w * torch.where(mask, delta / p if rescale else delta, 0))
    given = {"epsilon": epsilon} if method.startswith("della") else {}
    given |= {"weight": W, "density": density, "normalize": normalize, "rescale": rescale, "lambda_": 0.6}
    merged = merge(method, models, base, seed=3, **given)
    mean = sum(vectors) / (sum(W) if normalize else 1)
    mixed = elected(vectors, W, normalize) if method in ("della", "dare_ties") else mean
    torch.testing.assert_close(merged, base + 0.6 * mixed, rtol=1e-9, atol=1e-10)


def test_della_ranks_equal_magnitudes_by_index() -> None:
    row = torch.tensor([[2.0, -1.0, 1.0, -2.0, 0.5]], dtype=torch.float64)
    expected = torch.tensor([[0.65, 0.35, 0.5, 0.8, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(probabilities(row, 0.5, 0.3), expected)
    assert probabilities(row.mT, 0.5, 0.3).unique().tolist() == [0.5]  # a rank needs two


def test_where_deltas_cancel_the_positive_ones_are_elected(merge) -> None:
    delta = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    base = torch.ones(1, 3, dtype=torch.float64)
    models = [base + delta, base - delta]
    for method, given in (("ties", {"weight": 1.0}), ("della", {"weight": 1.0}), ("sce", {})):
        torch.testing.assert_close(merge(method, models, base, **given), base + delta.abs())


@pytest.mark.parametrize("normalize", ["model", "tensor", "none"])
def test_fisher_of_zeros_counts_for_nothing(merge, random_models, normalize) -> None:
    models, _ = random_models(2)
    zeros, ones = torch.zeros(models[0].shape), torch.ones(models[0].shape)
    one_knows = merge("fisher", models, fisher=[zeros, ones], fisher_normalize=normalize)
    torch.testing.assert_close(one_knows, models[1].double(), **EXACT)
    none_knows = merge("fisher", models, fisher=[zeros, zeros], fisher_normalize=normalize)
    torch.testing.assert_close(none_knows, (models[0].double() + models[1].double()) / 2, **EXACT)


def test_model_stock(merge, random_models) -> None:
    models, base = random_models(4)
    deltas = [m - base.double() for m in wide(models)]
    deltas = [d + deltas[0] for d in deltas[1:]] + [deltas[0]]
    models = [base.double() + d for d in deltas]
    pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[:i]]
    c = sum((a * b).sum() / (a.norm() * b.norm()) for a, b in pairs) / len(pairs)
    t = 4 * c / (1 + 3 * c)
    expected = t * sum(models) / 4 + (1 - t) * base.double()
    torch.testing.assert_close(merge("model_stock", models, base.double()), expected, **EXACT)
    rows = torch.stack(
        [merge("model_stock", [m[r] for m in models], base[r].double()) for r in range(base.shape[0])]
    )
    torch.testing.assert_close(merge("model_stock", models, base.double(), filter_wise=True), rows, **EXACT)
    assert not torch.allclose(rows, expected, atol=1e-4)


@pytest.mark.parametrize("topk", [1.0, 0.4, 0.0])
def test_sce(merge, random_models, topk, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.merging.methods.rows.BLOCK_ELEMENTS", 100)
    models, base = random_models()
    models[1] = base + 3 * (models[1] - base)
    for model in models:
        model[:3] = base[:3]  # no variance there
    deltas = torch.stack([m - base.double() for m in wide(models)])
    variance = deltas.var(0, correction=0)
    count = int(int((variance > 0).sum()) * topk)
    assert count in (0, int(21 * 40 * topk))
    mask = largest(variance, count) if topk < 1 else torch.ones(base.shape)
    d = deltas * mask
    weights = d.square().mean((1, 2))
    weights = weights / weights.sum() if weights.sum() else weights
    sign = torch.where(d.sum(0) >= 0, 1.0, -1.0)
    counted = weights[:, None, None] * (d.sign() == sign)
    divisor = counted.sum(0)
    expected = base.double() + (d * counted).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    torch.testing.assert_close(merge("sce", models, base, select_topk=topk), expected, **FLOAT32)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_element_by_element(merge, random_models, method, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.merging.methods.rows.BLOCK_ELEMENTS", 100)
    models, base = random_models(dtype=torch.float64)
    deltas = torch.stack([m - base for m in models]).flatten(1)
    moved = deltas.abs() > 0.1
    factors = torch.ones(3).double()
    if method == "ramplus_tl":
        for k in range(3):
            others = moved[[j for j in range(3) if j != k]].any(0)
            unique, shared = int((moved[k] & ~others).sum()), int((moved[k] & others).sum())
            factors[k] = 1 + 0.3 * min(shared / unique, 0.9)
        assert factors.min() > 1.1
    expected = base.flatten().clone()
    for n in range(base.numel()):
        who = [k for k in range(3) if moved[k, n]]
        if len(who) == 1:
            expected[n] += factors[who[0]] * deltas[who[0], n]
        elif who:
            expected[n] += sum(deltas[k, n] for k in who) / len(who)
    more = {"r": 0.3, "alpha": 0.9} if method == "ramplus_tl" else {}
    merged = merge(method, models, base, epsilon=0.1, **more)
    torch.testing.assert_close(merged, expected.view(base.shape), **EXACT)


def test_arcee_fusion(merge, random_models, monkeypatch) -> None:
    monkeypatch.setattr("toolkit.merging.methods.rows.BLOCK_ELEMENTS", 100)
    (model,), base = random_models(1, dtype=torch.float64)
    model[3:] = torch.where(torch.rand(base[3:].shape) < 0.5, model[3:], base[3:])
    p, q = model.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    importance = (model - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ranked = importance.flatten().sort().values
    first, median, third = (ranked[int(q * (ranked.numel() - 1))] for q in (0.25, 0.5, 0.75))
    chosen = importance > (median + 1.5 * (third - first)) * (1 + 1e-6)
    assert 0 < chosen.sum() < 0.3 * chosen.numel()
    assert torch.equal(merge("arcee_fusion", [model], base), torch.where(chosen, model, base))


@pytest.mark.parametrize("with_base", [True, False])
def test_fisher_simple(merge, random_models, with_base) -> None:
    models, base = random_models()
    models[1] = base + 4 * (models[1] - base)
    origin = base.double() if with_base else torch.zeros(base.shape)
    f = [w * (m - origin).norm() for w, m in zip(W, wide(models), strict=True)]
    expected = sum(x * m for x, m in zip(f, wide(models), strict=True)) / sum(f)
    merged = merge("fisher_simple", models, base if with_base else None, weight=W)
    torch.testing.assert_close(merged, expected, **EXACT)


@pytest.mark.parametrize("method", ["fisher", "from_optimizer"])
@pytest.mark.parametrize("normalize", ["model", "tensor", "none"])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_fisher(merge, random_models, method, normalize, floor) -> None:
    models, _ = random_models()
    generator = torch.Generator().manual_seed(5)
    # Of language models: tiny, and of very different size from model to model.
    fisher = [s * torch.rand(models[0].shape, generator=generator) for s in (1e-12, 1e-9, 3e-11)]
    for values in fisher:
        values[2] = 0
    model_norms = [1e-11, 2e-8, 5e-10]
    norms = {"model": model_norms, "tensor": [f.double().norm() for f in fisher], "none": [1, 1, 1]}[
        normalize
    ]
    f = [
        w / n * torch.clamp(x, min=float(floor * x.mean()))
        for w, n, x in zip(W, norms, wide(fisher), strict=True)
    ]
    expected = sum(x * m for x, m in zip(f, wide(models), strict=True)) / sum(f)
    if not floor:
        expected[2] = (sum(w * m for w, m in zip(W, wide(models), strict=True)) / sum(W))[2]
    merged = merge(
        method,
        models,
        fisher=fisher,
        model_norms=model_norms,
        weight=W,
        fisher_normalize=normalize,
        fisher_floor=floor,
    )
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-11)


def test_tsv_m_by_singular_value_decompositions(merge, random_models) -> None:
    for shape in ((30, 18), (18, 30)):
        models, base = random_models(3, shape)
        parts = []
        for w, model in zip(W, wide(models), strict=True):
            u, s, vh = torch.linalg.svd(w * (model - base.double()), full_matrices=False)
            parts.append((u[:, :6], s[:6], vh[:6]))
        u, s, vh = (
            torch.cat([p[0] for p in parts], 1),
            torch.cat([p[1] for p in parts]),
            torch.cat([p[2] for p in parts]),
        )

        def polar(x):
            left, _, right = torch.linalg.svd(x, full_matrices=False)
            return left @ right

        expected = base.double() + 0.9 * polar(u) @ torch.diag(s) @ polar(vh)
        merged = merge("tsv_m", models, base, weight=W, lambda_=0.9)
        torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-8)


def test_iso_c_by_singular_value_decomposition(merge, random_models) -> None:
    for shape in ((30, 18), (18, 30)):
        models, base = random_models(3, shape)
        total = sum(w * (m - base.double()) for w, m in zip(W, wide(models), strict=True))
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        expected = base.double() + 0.9 * s.mean() * u @ vh
        merged = merge("iso_c", models, base, weight=W, lambda_=0.9)
        torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_spectral_methods_average_what_is_no_matrix(merge, random_models, method) -> None:
    for shape in ((31,), (3, 4, 5), ()):
        models, base = random_models(3, shape)
        mean = sum(w * (m - base.double()) for w, m in zip(W, wide(models), strict=True)) / sum(W)
        merged = merge(method, models, base, weight=W, lambda_=0.9)
        torch.testing.assert_close(merged, base.double() + 0.9 * mean, **EXACT)


def test_spectral_methods_add_no_directions_to_deltas_of_low_rank(merge) -> None:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(40, 24, generator=generator).double()
    factors = [
        (torch.randn(40, 2, generator=generator).double(), torch.randn(2, 24, generator=generator).double())
        for _ in range(3)
    ]
    models = [base + b @ a for b, a in factors]
    for method in ("tsv_m", "iso_c"):
        delta = merge(method, models, base) - base
        values = torch.linalg.svdvals(delta)
        assert (values[:6] > 0.1).all()
        assert values[6:].max() < 1e-9 * values[0]
