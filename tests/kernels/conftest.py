"""The helpers of cases.py and the backends under test; Triton's interpreter has its own: triton_interpreted.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from toolkit_kernels import dispatch
from toolkit_kernels.backend import Backend

HELD_TO_THE_REFERENCE = [name for name in dispatch.available("cpu") if name != "reference"]


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    """cases.py as a module."""
    spec = importlib.util.spec_from_file_location("meldkit_kernel_cases", Path(__file__).parent / "cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> Backend:
    return dispatch.backend("reference")


@pytest.fixture(params=HELD_TO_THE_REFERENCE, scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that this machine's CPU runs, but for the reference."""
    return dispatch.backend(request.param)


@pytest.fixture(params=[*HELD_TO_THE_REFERENCE, "reference"], scope="session")
def any_backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend that this machine's CPU runs."""
    return dispatch.backend(request.param)
