"""Which backend computes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit_kernels import dispatch
from toolkit_kernels.rules import Inputs, Piece, WeightedSum

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without(monkeypatch):
    """Hide packages, as on a machine where they are not installed."""
    hidden: set[str] = set()
    find = importlib.util.find_spec

    def hide(*packages: str) -> None:
        hidden.update(packages)
        dispatch.backend.cache_clear()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    yield hide
    dispatch.backend.cache_clear()


def test_every_name_has_a_backend():
    for name in ("numba", "torch", "reference"):
        if name in dispatch.available("cpu"):
            assert dispatch.backend(name).name == name
    assert dispatch.backend("torch") is dispatch.backend("torch")


def test_the_fastest_comes_first():
    assert dispatch.backend("auto", "cpu").name == dispatch.available("cpu")[0]
    assert dispatch.available("cpu")[-2:] == ["torch", "reference"]
    assert "numba" not in dispatch.available("cuda:1")
    assert "triton" not in dispatch.available("cpu")


def test_without_numba_torch_computes(without):
    without("numba")
    assert dispatch.available("cpu") == ["torch", "reference"]
    assert dispatch.backend().name == "torch"


def test_without_triton_torch_computes_on_a_gpu(without):
    without("triton")
    assert dispatch.available("cuda") == ["torch", "reference"]
    assert dispatch.backend(device="cuda:0").name == "torch"


@pytest.mark.parametrize(
    "error", ["ImportError('needs numpy 2.3 or less')", "OSError('libffi.so: cannot open')"]
)
@pytest.mark.parametrize("package", ["llvmlite", "numba"])
def test_auto_goes_on_where_numba_is_installed_but_broken(tmp_path, package, error):
    """numba refuses a numpy that is too new when it is imported; only code in the cache does without it."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {error}\n")
    code = (
        "from toolkit_kernels import dispatch\n"
        "print(dispatch.backend().name)\n"
        "try: dispatch.backend('numba')\n"
        "except (ImportError, OSError) as error: print(error)\n"
    )
    environment = {**os.environ, "MELDKIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "kernels",
        env=environment,
    )
    chosen, message = done.stdout.splitlines()
    assert chosen == "torch"
    assert message in error


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match=r"no backend 'cuda'; there are auto, triton, numba, torch, reference"
    ):
        dispatch.backend("cuda")


def test_a_rule_that_needs_a_base_says_so(cases):
    span = cases.span([1.0])
    for name in ("torch", "reference"):
        piece = cases.piece("task_arithmetic", 1, 1, ("float32",), "float32")
        with pytest.raises(ValueError, match="needs a base"):
            dispatch.backend(name).apply([Piece(Inputs((span,)), piece.rule, span)])
        with pytest.raises(ValueError, match="needs a base"):
            dispatch.backend(name).apply([Piece(Inputs((span,)), WeightedSum(piece.rule.weights, 1.0), span)])


def test_the_contract_imports_neither_torch_nor_numba():
    """Merging files on a CPU starts without torch."""
    code = (
        "import sys\n"
        "from toolkit_kernels import backend, dispatch, philox, pool, reference, rules, spans, sums\n"
        "dispatch.available()\n"
        "print(sorted({'torch', 'numba', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "kernels"
    )
    assert done.stdout.strip() == "[]"
