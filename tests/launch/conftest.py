"""GPUs and environments that this machine may not have."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.launch import devices
from toolkit.launch.devices import Gpu

PROBES = Path(__file__).parent / "probes"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Gpu]]:
    """Give the machine GPUs: ``machine(2)``, ``machine(2, capability=(7, 5), build="2.13.0+cpu")``."""

    def give(
        num_gpus: int, *, capability: tuple[int, int] = (9, 0), build: str = "2.13.0+cu130", num_cpus: int = 8
    ) -> list[Gpu]:
        gpus = [Gpu(str(n), n, f"GPU-{n}abc", "NVIDIA Test", capability, 80 << 30) for n in range(num_gpus)]
        monkeypatch.setattr(devices, "machine_gpus", lambda: list(gpus))
        monkeypatch.setattr(devices, "torch_build", lambda: build)
        monkeypatch.setattr(devices, "num_cpus", lambda: num_cpus)
        return gpus

    return give


@pytest.fixture
def cut_machine(machine: Callable[..., list[Gpu]], monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    """A machine with one GPU, cut into two MIG slices."""
    (whole,) = machine(1)
    slices = [dataclasses.replace(whole, name=uuid, uuid=uuid) for uuid in ("MIG-aaa", "MIG-abb")]
    monkeypatch.setattr(devices, "machine_gpus", lambda: list(slices))
    return slices


@pytest.fixture
def probe_environment(tmp_path: Path) -> dict[str, str]:
    """Environment in which the modules of probes/ can be launched, without the traces of other launchers."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(("ACCELERATE_", "MELDKIT_"))
    }
    return environ | {
        "PYTHONPATH": str(PROBES),
        "OMP_NUM_THREADS": "1",
        "MELDKIT_CACHE": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }
