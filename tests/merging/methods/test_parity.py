"""Every method that mergekit has, against mergekit's own (0.1.5), in float32; skipped where it is not installed.

Run them with a Python that has mergekit and pytest: ``PYTHONPATH=.:kernels PYTHON -m pytest tests/merging/methods``.

Agreement: |ours - theirs| <= 1e-6 |theirs| + 1e-6 for elements of size 1 and deltas of size 0.1, which is the rounding
of their float32 sums (ours are float64, rounded once); 1e-5 where they divide by a small sine (said at the test).

Where the two differ on purpose:

| what                           | mergekit 0.1.5                               | here                               |
|--------------------------------|----------------------------------------------|------------------------------------|
| bf16, fp16                     | deltas, masks and most sums in the dtype of  | float64, rounded once              |
|                                | the inputs, each step rounded                |                                    |
| dare_*, della*: rescale        | by the ratio of L1 norms of the tensor       | by 1 / p as in the papers:         |
|                                | before and after                             | unbiased element by element        |
| random numbers                 | torch's generator: depend on thread count    | Philox by seed, tensor name, model |
|                                | and on what was drawn before                 | and index                          |
| equal magnitudes at the limit  | whichever argsort puts first                 | those of lowest index              |
| ties, breadcrumbs*: `rescale`  | an option (off)                              | not there: no paper has it         |
| `int8_mask`                    | the dtype of masks in memory                 | no mask is stored                  |
| density outside 0 to 1         | taken as 0 or 1                              | an error                           |
| weights that add up to 0       | NaN (linear, multislerp)                     | an error                           |
| slerp with a tensor of zeros   | as if at a right angle                       | a line                             |
| nuslerp: parallel vectors      | where the sine is 0 in float32, below about  | where it is below 1e-6             |
|                                | 1e-4                                         |                                    |
| multislerp: directions cancel  | an error from three models on                | the weighted sum, as for two       |
| multislerp: tangent step       | computed; analytically zero                  | left out                           |
| karcher: weights               | equal                                        | `weight`, equal by default         |
| karcher: short tensors         | left out where the norm is at most `tol`     | only zeros are                     |
| karcher: bf16                  | the mean rounded to bf16 in each step        | K coefficients in float64          |
| model_stock: tiny deltas       | products of norms below 1e-6 count as 1e-6   | cosines at any scale               |
| sce: tiny deltas               | equal weights where mean squares add up to   | weights at any scale               |
|                                | less than 1e-6 (deltas of about 5e-4)        |                                    |
| arcee_fusion: quartiles        | of a random million elements, importance in  | of all, importance in float64      |
|                                | float32                                      |                                    |
| nearswap: t below 1e-6         | differences below 1e-6 count as 1e-6         | as the formula says                |
| della: a row of one element    | fails (0 / 0 as a probability)               | probability `density`              |
| della: three dimensions        | ranks along the second                       | ranks along the last               |
"""

from typing import Any

import numpy as np
import pytest
import torch

from toolkit.merging.methods.della import probabilities
from toolkit_kernels.philox import key_of, random_words

api = pytest.importorskip("mergekit.merge_methods.api")

W = [0.5, 1.5, 0.7]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def theirs(
    method: str, models: list[torch.Tensor], base: torch.Tensor | None = None, **parameters: Any
) -> torch.Tensor:
    """mergekit's result; its per-input parameters are of the models without the base."""
    tensors = models if base is None else [base, *models]
    ids = [f"m{k}" for k in range(len(models))]
    given = {
        name: dict(zip(ids, value, strict=True)) if isinstance(value, list) else value
        for name, value in parameters.items()
    }
    return api.merge_tensors(
        tensors,
        method,
        parameters=given,
        ids=ids if base is None else ["base", *ids],
        base_index=None if base is None else 0,
        name="layer.weight",
    ).double()


@pytest.fixture
def check(merge):
    def compare(method, models, base=None, close=CLOSE, **parameters) -> torch.Tensor:
        merged = merge(method, models, base, **parameters)
        torch.testing.assert_close(merged, theirs(method, models, base, **parameters), **close)
        return merged

    return compare


@pytest.mark.parametrize("shape", [(24, 40), (33,), (4, 5, 6), (1, 1)])
class TestEveryShape:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_linear(self, check, random_models, shape, normalize) -> None:
        models, _ = random_models(3, shape)
        check("linear", models, weight=W, normalize=normalize)

    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
    def test_slerp(self, check, random_models, shape, t) -> None:
        (first, other), _ = random_models(2, shape, seed=4)
        check("slerp", [other - 0.7 * first], first, t=t)
        check("slerp", [first + 1e-4 * other], first, t=t)

    @pytest.mark.parametrize("with_base", [True, False])
    @pytest.mark.parametrize("flatten", [True, False])
    @pytest.mark.parametrize("row_wise", [True, False])
    def test_nuslerp(self, check, random_models, shape, with_base, flatten, row_wise) -> None:
        models, base = random_models(2, shape)
        models[1] = models[1] - 0.6 * models[0]
        parameters = {"weight": [0.5, 1.5], "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
        # Short vectors can be nearly opposite: both results are then large differences over a small sine.
        check(
            "nuslerp", models, base if with_base else None, close={"rtol": 1e-5, "atol": 1e-5}, **parameters
        )

    @pytest.mark.parametrize("with_base", [True, False])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_multislerp(self, check, random_models, shape, with_base, normalize) -> None:
        models, base = random_models(3, shape)
        check("multislerp", models, base if with_base else None, weight=W, normalize_weights=normalize)

    @pytest.mark.parametrize("max_iter", [1, 10])
    def test_karcher(self, check, random_models, shape, max_iter) -> None:
        models, _ = random_models(3, shape)
        models[1] = models[1] - 0.6 * models[0]
        check("karcher", models, max_iter=max_iter)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_task_arithmetic(self, check, random_models, shape, normalize) -> None:
        models, base = random_models(3, shape)
        check("task_arithmetic", models, base, weight=W, normalize=normalize, **{"lambda": 0.7})

    @pytest.mark.parametrize("density", [[1.0, 1.0, 1.0], [0.2, 0.5, 0.9], [0.0, 1e-9, 1.0]])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_ties(self, check, random_models, shape, density, normalize) -> None:
        models, base = random_models(3, shape)
        check("ties", models, base, weight=W, density=density, normalize=normalize, **{"lambda": 0.7})

    @pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
    @pytest.mark.parametrize("density", [[1.0, 1.0, 1.0], [0.2, 0.5, 0.9], [0.0, 0.99, 1.0]])
    @pytest.mark.parametrize("gamma", [0.01, 0.3])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_breadcrumbs(self, check, random_models, shape, method, density, gamma, normalize) -> None:
        models, base = random_models(3, shape)
        check(
            method,
            models,
            base,
            weight=W,
            density=density,
            gamma=[gamma] * 3,
            normalize=normalize,
            **{"lambda": 0.7},
        )

    @pytest.mark.parametrize("filter_wise", [True, False])
    def test_model_stock(self, check, random_models, shape, filter_wise) -> None:
        models, base = random_models(3, shape)
        common = torch.randn(shape, generator=torch.Generator().manual_seed(8))
        models = [model + 0.2 * common for model in models]
        # Rows of a few elements can lie where t has its pole.
        check("model_stock", models, base, close={"rtol": 1e-5, "atol": 1e-5}, filter_wise=filter_wise)

    @pytest.mark.parametrize("topk", [1.0, 0.3, 0.0])
    def test_sce(self, check, random_models, shape, topk) -> None:
        models, base = random_models(3, shape)
        models[1] = base + 2 * (models[1] - base)
        check("sce", models, base, select_topk=topk)

    @pytest.mark.parametrize("t", [0.0, 0.05, 1.0])
    def test_nearswap(self, check, random_models, shape, t) -> None:
        (model,), base = random_models(1, shape)
        check("nearswap", [model], base, t=t)

    @pytest.mark.parametrize("epsilon", [1e-5, 0.05])
    def test_ram(self, check, random_models, shape, epsilon) -> None:
        models, base = random_models(3, shape)
        check("ram", models, base, epsilon=epsilon)
        check("ramplus_tl", models, base, epsilon=epsilon, r=0.5, alpha=0.8)
        check("ramplus_tl", models, base, epsilon=epsilon)

    def test_passthrough(self, check, random_models, shape) -> None:
        (model,), _ = random_models(1, shape)
        check("passthrough", [model])
        check("passthrough", [model], scale=[0.7])

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
    @pytest.mark.parametrize("normalize", [True, False, None])
    def test_random_methods_that_drop_nothing(self, check, random_models, shape, method, normalize) -> None:
        models, base = random_models(3, shape)
        given = {} if normalize is None else {"normalize": normalize}
        check(method, models, base, weight=W, density=[1.0] * 3, **given, **{"lambda": 0.7})


def test_arcee_fusion_takes_the_same_elements(merge, random_models) -> None:
    (model,), base = random_models(1, (300, 400))
    ours, reference = merge("arcee_fusion", [model], base), theirs("arcee_fusion", [model], base)
    assert 0.005 < (ours == model).double().mean() < 0.2
    # Theirs comes from differences of logarithms in float32: some elements near the threshold fall on the other side.
    assert (ours - reference).ne(0).double().mean() < 1e-3


def test_defaults_are_theirs(check, random_models) -> None:
    models, base = random_models(3)
    for method in (
        "ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
    ):
        check(method, models, base, weight=W)
    for method in ("task_arithmetic", "multislerp"):
        check(method, models, base, weight=W)
    for method in ("model_stock", "sce"):
        check(method, models, base)
    check("linear", models, weight=W)
    check("karcher", models)
    check("nuslerp", models[:2], base, weight=W[:2])


DENSITY, EPSILON = [0.3, 0.6, 0.9], [0.1, 0.2, 0.05]


def kept(delta: torch.Tensor, k: int, *, by_rank: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and probabilities of model k, from the formula and the random words alone."""
    words = random_words(key_of(11, "layer.weight"), k, 0, delta.numel()).astype(np.int64)
    p = torch.full(delta.shape, DENSITY[k], dtype=torch.float64)
    if by_rank:
        p = probabilities(delta, DENSITY[k], EPSILON[k])
    return torch.from_numpy(words).view(delta.shape) < torch.floor(p * 2.0**32), p


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_random_methods_with_our_mask_put_through_their_formula(
    merge, random_models, method, rescale, normalize
) -> None:
    models, base = random_models(3, dtype=torch.float64)
    dropped = []
    for k, model in enumerate(models):
        mask, p = kept(model - base, k, by_rank=method.startswith("della"))
        dropped.append(base + torch.where(mask, (model - base) / (p if rescale else 1), 0))
    same_formula = "ties" if method in ("dare_ties", "della") else "task_arithmetic"
    expected = theirs(same_formula, dropped, base, weight=W, normalize=normalize, **{"lambda": 0.7})
    given = {"epsilon": EPSILON} if method.startswith("della") else {}
    merged = merge(
        method,
        models,
        base,
        seed=11,
        weight=W,
        density=DENSITY,
        rescale=rescale,
        normalize=normalize,
        lambda_=0.7,
        **given,
    )
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_both_keep_as_many_and_move_as_far_on_average(merge, method) -> None:
    shape = (200, 500)
    base, model = torch.zeros(shape), torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    torch.manual_seed(0)
    parameters = {"weight": [1.0], "density": [0.3]}
    ours, reference = merge(method, [model], base, **parameters), theirs(method, [model], base, **parameters)
    # Five standard deviations of a share of 100,000 draws, and of the mean of what they multiply.
    assert abs((ours != 0).double().mean() - 0.3) < 0.0073
    assert abs((reference != 0).double().mean() - 0.3) < 0.0073
    assert abs(ours.mean() - model.double().mean()) < 0.03
    assert abs(reference.mean() - model.double().mean()) < 0.03


def test_della_keeps_by_rank_as_they_do(merge) -> None:
    row = torch.tensor([0.5, -0.1, 0.9, -0.3, 0.7]).repeat(20_000, 1)
    base = torch.zeros(row.shape)
    parameters = {"weight": [1.0], "density": [0.5], "epsilon": [0.3]}
    torch.manual_seed(0)
    shares = [
        (result != 0).double().mean(0)
        for result in (
            merge("della_linear", [row], base, **parameters),
            theirs("della_linear", [row], base, **parameters),
        )
    ]
    expected = torch.tensor([0.5, 0.2, 0.8, 0.35, 0.65], dtype=torch.float64)
    for share in shares:
        torch.testing.assert_close(share, expected, rtol=0, atol=0.018)  # five standard deviations


@pytest.mark.parametrize("method", ["ties", "multislerp", "task_arithmetic", "karcher", "sce", "model_stock"])
def test_in_bfloat16_ours_is_the_nearest_number_and_theirs_is_not(merge, random_models, method) -> None:
    models, base = random_models(3, (100, 100), dtype=torch.bfloat16)
    parameters = {} if method in ("karcher", "sce", "model_stock") else {"weight": W}
    origin = None if method == "karcher" else base
    wide = [model.double() for model in models]
    exact = merge(method, wide, None if origin is None else origin.double(), **parameters)
    nearest = exact.float().bfloat16().double()
    ours = merge(method, models, origin, **parameters).float().bfloat16().double()
    assert torch.equal(ours, nearest)
    assert (theirs(method, models, origin, **parameters) != nearest).double().mean() > 0.05
