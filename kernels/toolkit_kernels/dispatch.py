"""Which backend computes: chosen by name, or the fastest that can run here."""

import contextlib
import functools
import importlib
import importlib.util

from toolkit_kernels.backend import Backend

# Module of each backend; each has a function make() -> Backend. Fastest first within a device.
MODULES = {
    "triton": "toolkit_kernels.triton_backend",
    "numba": "toolkit_kernels.numba_backend",
    "torch": "toolkit_kernels.torch_backend",
    "reference": "toolkit_kernels.reference",
}
NEEDS = {"triton": "triton", "numba": "numba", "torch": "torch", "reference": "numpy"}


def available(device: str = "cpu") -> list[str]:
    """Names of the backends that can run on ``device`` (``cpu``, ``cuda``, ``cuda:1``), fastest first."""
    on_cpu = device.partition(":")[0] == "cpu"
    names = ["numba", "torch", "reference"] if on_cpu else ["triton", "torch", "reference"]
    return [name for name in names if importlib.util.find_spec(NEEDS[name]) is not None]


@functools.cache
def backend(name: str = "auto", device: str = "cpu") -> Backend:
    """The backend ``name``; ``auto`` is the fastest that runs on ``device`` and can be imported.

    Raises:
        ValueError: no such backend.
        ImportError, OSError: what it needs is not installed, or damaged.
    """
    if name == "auto":
        *others, last = available(device)
        for other in others:
            with contextlib.suppress(ImportError, OSError):
                return backend(other, device)
        return backend(last, device)
    if name not in MODULES:
        raise ValueError(f"no backend {name!r}; there are auto, {', '.join(MODULES)}")
    return importlib.import_module(MODULES[name]).make()
