"""Merging eight LoRA adapters of the size of Llama 3.2 1B, beside PEFT's add_weighted_adapter, with the errors of both.

Paired on one layer of each shape: the same factors, one after the other. Ours also for the whole adapter, in memory and
from folder to folder. PEFT's time for the whole adapter is the sum over shapes of (its time for one layer) x (number of
such layers), and is called extrapolated.

    python bench/lora_merge.py --repeats 5 --out bench/results/lora_merge.json
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file

from toolkit.merging.lora import merge_adapter_states, merge_adapters
from toolkit_kernels import dispatch

NUM_LAYERS = 16
RANK, ALPHA = 16, 32
# Linear layers of one block: name -> (out, in).
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
MODES = {"concat": "cat", "svd": "svd", "factors": "linear"}
State = dict[str, torch.Tensor]


def modules() -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.{name}": shape for layer in range(NUM_LAYERS) for name, shape in SHAPES.items()
    }


def make_state(seed: int, shapes: dict[str, tuple[int, int]]) -> State:
    """Factors of the size that training leaves: A as initialised, B a tenth of it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (out, width) in shapes.items():
        a = torch.randn(RANK, width, generator=generator) / width**0.5
        b = torch.randn(out, RANK, generator=generator) * 0.1 / width**0.5
        state[f"base_model.model.{name}.lora_A.weight"] = a
        state[f"base_model.model.{name}.lora_B.weight"] = b
    return state


def configuration(targets: list[str]) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}


class OneLayer(torch.nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(shape[1], shape[0], bias=False)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * b.double() @ a.double()


def ours_on_one(states: list[State], weights: list[float], mode: str) -> tuple[float, torch.Tensor]:
    """Seconds, and the merged product in float64."""
    seconds, merged = timed(
        lambda: merge_adapter_states(states, [configuration(["layer"])], weights, mode, normalize=False)
    )
    module = merged.adapter.modules["layer"]
    return seconds, torch.from_numpy(module.scale * module.b.float64() @ module.a.float64())


def peft_on_one(
    states: list[State], weights: list[float], combination: str, shape: tuple[int, int], full_matrices: bool
) -> tuple[float, torch.Tensor]:
    """Seconds of add_weighted_adapter alone (the adapters are loaded), and the merged product in float64."""
    options = {key: value for key, value in configuration(["layer"]).items() if key != "peft_type"}
    names = [f"adapter{number}" for number in range(len(states))]
    model: Any = get_peft_model(OneLayer(shape), LoraConfig(**options), adapter_name=names[0])
    for name, state in zip(names, states, strict=True):
        if name != names[0]:
            model.add_adapter(name, LoraConfig(**options))
        set_peft_model_state_dict(model, state, adapter_name=name)
    seconds, _ = timed(
        lambda: model.add_weighted_adapter(
            names, weights, "merged", combination_type=combination, svd_full_matrices=full_matrices
        )
    )
    layer = model.base_model.model.layer
    a, b = layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()
    return seconds, product(a, b, layer.scaling["merged"])


def measure_shape(shape: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """One layer: seconds and relative errors of every mode, ours and PEFT's in turns."""
    states = [make_state(seed, {"layer": shape}) for seed in range(arguments.adapters)]
    weights = [(k + 1) / sum(range(1, arguments.adapters + 1)) for k in range(arguments.adapters)]
    exact = torch.zeros(shape, dtype=torch.float64)
    for state, weight in zip(states, weights, strict=True):
        a, b = (state[f"base_model.model.layer.lora_{x}.weight"] for x in "AB")
        exact += weight * product(a, b, ALPHA / RANK)
    rows: dict[str, Any] = {}
    arms: list[tuple[str, int, Callable[[], tuple[float, torch.Tensor]]]] = []
    for mode, combination in MODES.items():
        arms.append((f"ours {mode}", arguments.repeats, lambda m=mode: ours_on_one(states, weights, m)))
        if combination != "svd":
            arms.append(
                (
                    f"peft {combination}",
                    arguments.repeats,
                    lambda c=combination: peft_on_one(states, weights, c, shape, False),
                )
            )
    svd_runs = min(arguments.repeats, arguments.peft_svd_repeats)
    arms.append(("peft svd", svd_runs, lambda: peft_on_one(states, weights, "svd", shape, True)))
    arms.append(("peft svd, reduced", svd_runs, lambda: peft_on_one(states, weights, "svd", shape, False)))
    for repeat in range(arguments.repeats):
        for name, num_runs, run in arms:
            if repeat >= num_runs:
                continue
            seconds, merged = run()
            row = rows.setdefault(name, {"seconds": [], "relative_error": 0.0})
            row["seconds"].append(seconds)
            row["relative_error"] = float(torch.linalg.norm(merged - exact) / torch.linalg.norm(exact))
    return rows


def measure_whole(arguments: argparse.Namespace) -> dict[str, Any]:
    """All 112 modules: ours in memory and from folder to folder."""
    shapes = modules()
    states = [make_state(seed, shapes) for seed in range(arguments.adapters)]
    config = configuration(sorted({name.rpartition(".")[2] for name in shapes}))
    rows: dict[str, Any] = {"bytes_of_one_adapter": sum(t.nbytes for t in states[0].values())}
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / f"adapter{number}" for number in range(arguments.adapters)]
        for folder, state in zip(folders, states, strict=True):
            folder.mkdir()
            save_file(state, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config))
        for mode in MODES:
            memory, files = [], []
            for _ in range(arguments.repeats):
                seconds, merged = timed(lambda m=mode: merge_adapter_states(states, [config], None, m))
                memory.append(seconds)
                out = Path(root) / "out"
                files.append(
                    timed(lambda m=mode, o=out: merge_adapters(folders, None, o, m, overwrite=True))[0]
                )
                rows[mode] = {"relative_error": merged.relative_error}
            rows[mode] |= {"in_memory": spread(memory), "folders": spread(files)}
    return rows


def spread(seconds: list[float]) -> dict[str, float | int]:
    return {
        "median_seconds": round(statistics.median(seconds), 5),
        "minimum_seconds": round(min(seconds), 5),
        "maximum_seconds": round(max(seconds), 5),
        "num_runs": len(seconds),
    }


def extrapolated(by_shape: dict[str, Any], arm: str) -> float:
    """Seconds for a whole adapter from the medians of one layer of each shape."""
    counts: dict[str, int] = {}
    for shape in modules().values():
        counts[str(shape)] = counts.get(str(shape), 0) + 1
    return sum(by_shape[shape][arm]["median_seconds"] * count for shape, count in counts.items())


def machine() -> dict[str, Any]:
    packages = ("meldkit", "torch", "peft", "numpy", "numba")
    return {
        "processor": platform.processor(),
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "kernels": dispatch.backend("auto").name,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peft-svd-repeats", type=int, default=1, help="PEFT's svd takes minutes at its defaults"
    )
    parser.add_argument("--shapes", nargs="*", help="only these, as OUTxIN; no whole adapter then")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shapes = list(dict.fromkeys(SHAPES.values()))
    if arguments.shapes:
        shapes = [shape for shape in shapes if f"{shape[0]}x{shape[1]}" in arguments.shapes]
    ours_on_one([make_state(0, {"layer": (64, 64)})], [1.0], "concat")  # compiles the kernels
    by_shape: dict[str, Any] = {}
    for shape in shapes:
        rows = measure_shape(shape, arguments)
        by_shape[str(shape)] = {
            name: spread(row["seconds"]) | {"relative_error": row["relative_error"]}
            for name, row in rows.items()
        }
        for name, row in by_shape[str(shape)].items():
            sys.stdout.write(
                f"{shape!s:<14} {name:<18} {row['median_seconds'] * 1000:10.2f} ms  error {row['relative_error']:.2e}\n"
            )
    found: dict[str, Any] = {"one_layer": by_shape, "machine": machine(), "num_adapters": arguments.adapters}
    if not arguments.shapes:
        found["whole_adapter"] = measure_whole(arguments)
        arms = next(iter(by_shape.values()))
        found["whole_adapter_extrapolated_seconds"] = {
            arm: round(extrapolated(by_shape, arm), 3) for arm in arms
        }
        for arm, seconds in found["whole_adapter_extrapolated_seconds"].items():
            sys.stdout.write(f"{len(modules())} modules  {arm:<18} {seconds:10.2f} s extrapolated\n")
        for mode in MODES:
            row = found["whole_adapter"][mode]
            sys.stdout.write(
                f"{len(modules())} modules  ours {mode:<13} {row['in_memory']['median_seconds']:10.2f} s in memory, "
                f"{row['folders']['median_seconds']:.2f} s from folder to folder\n"
            )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
