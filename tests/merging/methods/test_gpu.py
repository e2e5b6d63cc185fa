"""What methods compute with torch, on a GPU: the CPU's result."""

import pytest
import torch

from toolkit.merging.memory import merge_state_dicts
from toolkit.merging.methods.grams import Grams

DEVICE = "cuda"

CASES = [
    ("sce", {"select_topk": 0.3}),
    ("della", {"weight": 1.0, "density": 0.4}),
    ("della_linear", {"weight": 1.0, "density": 0.4}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"weight": [1.0, 3.0], "nuslerp_flatten": False}),
    ("nuslerp", {"weight": [1.0, 3.0], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("ram", {"epsilon": 0.05}),
    ("ramplus_tl", {"epsilon": 0.05}),
    ("arcee_fusion", {}),
    ("tsv_m", {}),
    ("iso_c", {}),
    ("regmean", {}),
    ("karcher", {}),
    ("breadcrumbs_ties", {"weight": 1.0, "density": 0.4, "gamma": 0.1}),
    ("dare_ties", {"weight": 1.0, "density": 0.4}),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_a_gpu_gives_the_result_of_the_cpu(random_models, method, parameters) -> None:
    count = {"nuslerp": 2, "arcee_fusion": 1}.get(method, 3)
    models, base = random_models(count, (300, 500))
    if method == "regmean":
        x = torch.randn(count, 600, 500, generator=torch.Generator().manual_seed(0))
        parameters = {"gram": [Grams({"layer.weight": row.mT @ row / 600}, 600) for row in x]}

    def run(device: str) -> torch.Tensor:
        states = [{"layer.weight": model.to(device)} for model in models]
        origin = None if method in ("karcher", "regmean", "nuslerp") else {"layer.weight": base.to(device)}
        return merge_state_dicts(states, method, base=origin, **parameters)["layer.weight"]

    merged = run(DEVICE)
    assert merged.device.type == DEVICE
    # float64 on both; what is left is one rounding to float32.
    torch.testing.assert_close(merged.cpu(), run("cpu"), rtol=2e-7, atol=1e-7)
