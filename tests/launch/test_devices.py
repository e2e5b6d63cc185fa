"""GPUs as NVML and CUDA_VISIBLE_DEVICES tell them."""

from collections.abc import Callable
from typing import Any

import pytest

from toolkit.launch import devices


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ["0", "1", "2"]),
        ("", []),
        ("-1", []),
        ("1", ["1"]),
        ("2, 0", ["2", "0"]),
        ("1,-1,2", ["1"]),  # as in CUDA the list ends at the first entry that is no GPU
        ("0,9,1", ["0"]),
        ("GPU-2abc", ["2"]),
        ("GPU-2", ["2"]),
        ("GPU-", []),  # not unique
        ("G", []),
        ("1,1", ["1"]),
    ],
)
def test_cuda_visible_devices(
    machine: Callable[..., list[Any]], setting: str | None, expected: list[str]
) -> None:
    gpus = machine(3)
    environ = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    assert [gpu.name for gpu in devices.visible_gpus(gpus, environ)] == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ["MIG-aaa", "MIG-abb"]),
        ("0", ["MIG-aaa"]),
        ("1", []),
        ("MIG-abb", ["MIG-abb"]),
        ("MIG-ab,MIG-aaa", ["MIG-abb", "MIG-aaa"]),
        ("MIG-a", []),
    ],
)
def test_cuda_visible_devices_of_slices(
    cut_machine: list[devices.Gpu], setting: str | None, expected: list[str]
) -> None:
    environ = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    assert [gpu.name for gpu in devices.visible_gpus(cut_machine, environ)] == expected


def test_the_build_of_torch_is_read_without_torch() -> None:
    import torch

    assert devices.torch_build() == torch.__version__
    assert devices.torch_is_cpu_only("2.13.0+cpu")
    assert devices.torch_is_cpu_only("2.13.0+cpu.cxx11.abi")
    assert not devices.torch_is_cpu_only("2.13.0+cu130")
    assert not devices.torch_is_cpu_only("2.13.0")


def test_this_machine_can_be_asked() -> None:
    assert devices.num_cpus() >= 1
    for gpu in devices.machine_gpus():
        assert gpu.memory_bytes > 0


@pytest.mark.gpu
def test_nvml_and_torch_agree_on_the_gpus() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    gpus = devices.visible_gpus(devices.machine_gpus())
    assert len(gpus) == torch.cuda.device_count()
    for index, gpu in enumerate(gpus):
        properties = torch.cuda.get_device_properties(index)
        assert gpu.compute_capability == (properties.major, properties.minor)
        assert gpu.model == properties.name
