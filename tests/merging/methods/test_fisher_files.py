"""Files of Fisher information: ours without a pass over them, others after one, wrong ones not at all."""

import json

import pytest
import torch
from safetensors.torch import save_file

from toolkit.errors import ModelError
from toolkit.merging.fisher import Fisher
from toolkit.merging.fisher_files import open_fisher
from toolkit_kernels.reference import read


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (700, 900), "a.bias": (9,), "scale": (), "none": (0, 3)}
    return {name: 1e-13 * torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def save(tensors, path, **changes):
    Fisher(tensors, num_examples=12, kind="empirical", task="causal-lm", data_fingerprint="0" * 64).save(path)
    if changes:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata()
        save_file(tensors, path, metadata=metadata | changes)
    return path


def same_facts(file, tensors):
    assert set(file.names()) == tensors.keys()
    everything = torch.cat([t.double().flatten() for t in tensors.values()])
    for name, tensor in tensors.items():
        entry = file.tensor(name, tuple(tensor.shape))
        assert entry.norm == pytest.approx(float(tensor.double().norm()), rel=1e-12)
        assert entry.mean == pytest.approx(
            float(tensor.double().mean()) if tensor.numel() else 0.0, rel=1e-12
        )
        assert entry.model_norm == pytest.approx(float(everything.norm()), rel=1e-12)
        values = read(entry.reader.span(0, tensor.numel()))
        assert torch.equal(torch.from_numpy(values).view(tensor.shape), tensor.double())
    assert file.tensor("b.weight") is None


def test_our_own_file_brings_norms_and_means(tensors, tmp_path, monkeypatch) -> None:
    path = save(tensors, tmp_path / "fisher.safetensors")
    monkeypatch.delattr("toolkit.merging.fisher_files.norm_and_mean")  # no pass over the elements
    file = open_fisher(path)
    assert (file.kind, file.num_examples) == ("empirical", 12)
    same_facts(file, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_file_of_non_negative_tensors_is_measured(tensors, tmp_path, dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    file = open_fisher(tmp_path / "other.safetensors")
    assert (file.kind, file.num_examples) == ("", None)
    same_facts(file, tensors)


@pytest.mark.parametrize("value", [-1e-20, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 629_999])
def test_what_is_no_fisher_information_is_refused(tensors, tmp_path, value, place) -> None:
    tensors["a.weight"].view(-1)[place] = value
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=rf"other\.safetensors: a\.weight holds {value:g}"):
        open_fisher(tmp_path / "other.safetensors")


def test_integers_are_refused(tmp_path) -> None:
    save_file({"ids": torch.arange(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="ids is of int64"):
        open_fisher(tmp_path / "other.safetensors")


@pytest.mark.parametrize("key", ["norms", "means"])
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a.weight": "x"}', '{"a.weight": null}'])
def test_garbled_metadata_is_refused(tensors, tmp_path, key, text) -> None:
    path = save(tensors, tmp_path / "fisher.safetensors", **{key: text})
    with pytest.raises(ModelError, match=rf"fisher\.safetensors: '{key}' in its metadata"):
        open_fisher(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_numbers_that_cannot_be_are_refused(tensors, tmp_path, number) -> None:
    norms = json.dumps(dict.fromkeys(tensors, 1.0) | {"a.bias": number})
    path = save(tensors, tmp_path / "fisher.safetensors", norms=norms)
    with pytest.raises(ModelError, match=r"a\.bias has .* among its 'norms'"):
        open_fisher(path)


def test_the_fisher_of_another_model_is_refused(tensors, tmp_path) -> None:
    file = open_fisher(save(tensors, tmp_path / "fisher.safetensors"))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    file.check(shapes | {"frozen.weight": (3,)})
    with pytest.raises(ModelError, match=r"holds a\.bias, which the model has not"):
        file.check({name: shape for name, shape in shapes.items() if name != "a.bias"})
    with pytest.raises(
        ModelError, match=r"a\.weight has the shape \[700, 900\], and in the model \[900, 700\]"
    ):
        file.check(shapes | {"a.weight": (900, 700)})
    with pytest.raises(ModelError, match="another model"):
        file.tensor("a.weight", (900, 700))


def test_a_file_without_tensors_is_refused(tmp_path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ModelError, match="holds no tensor"):
        open_fisher(tmp_path / "empty.safetensors").check({"a": (1,)})


def test_a_missing_fisher_means_a_plain_mean(merge, random_models) -> None:
    models, _ = random_models(2)
    fisher = [torch.rand(models[0].shape), None]
    for method in ("fisher", "from_optimizer"):
        merged = merge(method, models, fisher=fisher, weight=[1.0, 3.0])
        torch.testing.assert_close(merged, 0.25 * models[0].double() + 0.75 * models[1].double())
