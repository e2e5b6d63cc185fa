import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from toolkit.errors import ModelError
from toolkit.merging.fisher import Fisher


@pytest.fixture
def fisher() -> Fisher:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.rand(3, 4, generator=generator) * 1e-3,
        # its squares, 1e-48, do not exist in float32
        "b.weight": torch.full((5,), 1e-24),
    }
    return Fisher(
        tensors=tensors, num_examples=7, kind="true", task="causal-lm", data_fingerprint="f" * 64,
        slow_parameters=("b.weight",),
    )  # fmt: skip


def test_norms_and_means(fisher) -> None:
    wide = {name: tensor.double() for name, tensor in fisher.tensors.items()}
    assert fisher.norms == pytest.approx({name: t.norm().item() for name, t in wide.items()}, rel=1e-12)
    assert fisher.means == pytest.approx({name: t.mean().item() for name, t in wide.items()}, rel=1e-12)
    assert fisher.norms["b.weight"] == pytest.approx(5**0.5 * 1e-24, rel=1e-6)
    everything = torch.cat([tensor.flatten() for tensor in wide.values()])
    assert fisher.global_norm == pytest.approx(everything.norm().item(), rel=1e-12)


def test_a_file_comes_back_as_it_was(fisher, tmp_path) -> None:
    path = tmp_path / "new" / "fisher.safetensors"
    fisher.save(path)
    again = Fisher.load(path)
    assert again.tensors.keys() == fisher.tensors.keys()
    for name, tensor in fisher.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    for field in ("num_examples", "kind", "task", "data_fingerprint", "slow_parameters", "normalisation"):
        assert getattr(again, field) == getattr(fisher, field)
    assert (again.norms, again.means, again.global_norm) == (fisher.norms, fisher.means, fisher.global_norm)


def test_merging_needs_only_the_header(fisher, tmp_path) -> None:
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    with safe_open(path, framework="pt") as stream:
        facts = stream.metadata()
    assert facts["format"] == "meldkit-fisher-1"
    assert (facts["n_examples"], facts["kind"], facts["data_fingerprint"]) == ("7", "true", "f" * 64)
    assert "sum over trained tokens" in facts["normalisation"]
    assert json.loads(facts["norms"]) == fisher.norms
    assert json.loads(facts["means"]) == fisher.means
    assert float(facts["global_norm"]) == fisher.global_norm


def test_a_file_is_replaced_whole_or_not_at_all(fisher, tmp_path) -> None:
    path = tmp_path / "fisher.safetensors"
    path.write_text("old")
    mode = stat.S_IMODE(path.stat().st_mode)
    broken = Fisher(
        tensors={"a": torch.zeros(2, 2), "not text": None},  # type: ignore[dict-item] - the failure is meant
        num_examples=1, kind="true", task="causal-lm", data_fingerprint="", norms={"a": 0.0},
    )  # fmt: skip
    with pytest.raises(AttributeError):
        broken.save(path)
    assert path.read_text() == "old"
    fisher.save(path)
    assert Fisher.load(path).num_examples == 7
    assert stat.S_IMODE(path.stat().st_mode) == mode, "readable as other files of the user"
    assert [p.name for p in tmp_path.iterdir()] == ["fisher.safetensors"]


def test_other_files_are_refused(tmp_path) -> None:
    other = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(ModelError, match=r"model\.safetensors is a safetensors file, but not of Fisher"):
        Fisher.load(other)
    other.write_text("no safetensors at all")
    with pytest.raises(ModelError, match="cannot be read"):
        Fisher.load(other)
    with pytest.raises(ModelError, match="cannot be read"):
        Fisher.load(tmp_path / "missing.safetensors")
