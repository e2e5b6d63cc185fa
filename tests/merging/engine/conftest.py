"""Small models on disk and plans to merge them, without recipes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from toolkit.merging.plan import InputModel, MergePlan, OutputTensor
from toolkit.merging.registry import MergeMethod
from toolkit.merging.streaming.folder_source import FolderSource
from toolkit_kernels.rules import WeightedSum


def linear(group, weight):
    return WeightedSum(weight / weight.sum())


def a_method(
    function: Callable[..., Any], name: str = "linear", base: Literal["none", "required"] = "none"
) -> MergeMethod:
    return MergeMethod(name, function, "", "", base, False, (1, None), (), ordered=True)


@pytest.fixture(scope="session")
def method_of():
    """method_of(function) → a method that is registered nowhere."""
    return a_method


@pytest.fixture(scope="session")
def write_model():
    """write_model(folder, tensors, shards=…) writes a model folder as transformers does, without a real config."""

    def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        names = list(tensors)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture(scope="session")
def plan_of():
    """plan_of(folders, …) → the plan that merges all of their tensors by one method; integers are copied."""

    def plan(
        folders: list[Path],
        method: MergeMethod | None = None,
        *,
        parameters: dict[str, Any] | None = None,
        dtype: str | None = None,
        base: Path | None = None,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
    ) -> MergePlan:
        sources = [FolderSource(folder.name, folder) for folder in folders]
        theta_0 = FolderSource("base", base) if base else None
        chosen = method or a_method(linear)
        if parameters is None:
            parameters = {} if method else {"weight": np.ones(len(folders))}
        tensors = []
        for name in sources[0].names():
            readers = tuple(source.reader(name) for source in sources)
            first = readers[0]
            if not first.dtype.startswith(("float", "bfloat")):
                tensors.append(OutputTensor(name, first.shape, first.dtype, readers[:1]))
                continue
            base_reader = theta_0.reader(name) if theta_0 else None
            tensors.append(
                OutputTensor(
                    name,
                    first.shape,
                    dtype or first.dtype,
                    readers,
                    base_reader,
                    method=chosen,
                    parameters=parameters,
                )
            )
        config = (folders[0] / "config.json").read_text()
        inputs = [InputModel(source.label, "model", source.files) for source in sources]
        inputs += [InputModel("base", "base", theta_0.files)] if theta_0 else []

        def write_companions(staged: Path) -> None:
            (staged / "config.json").write_text(config)

        return MergePlan(tensors, inputs, chosen.name, seed, settings or {}, [], write_companions)

    return plan


@pytest.fixture
def random_state():
    """random_state(seed) → tensors of awkward sizes; several pieces, wide and tiny ones, no elements, no dimensions."""

    def state(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "wide": (700, 1031),
            "large": (300_001,),
            "block": (1024,),
            "above": (1025,),
            "odd": (7, 11),
            "one": (1,),
            "scalar": (),
            "empty": (0, 4),
        }
        shapes |= {f"small.{i}": (3 + i % 5,) for i in range(40)}
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    return state


@pytest.fixture
def models(tmp_path, write_model, random_state) -> list[Path]:
    """Three random models."""
    return [write_model(tmp_path / f"model-{k}", random_state(k)) for k in range(3)]
