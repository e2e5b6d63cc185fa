"""Shards, names, index and places, as Hugging Face lays models out."""

import json
import struct

import pytest

from toolkit.errors import ModelError
from toolkit.merging.group import MemoryReader
from toolkit.merging.plan import OutputTensor
from toolkit.merging.streaming.layout import lay_out
from toolkit_kernels.spans import Span


def tensor(name: str, size: int, dtype: str = "bfloat16") -> OutputTensor:
    reader = MemoryReader(Span(None, dtype), (size,), dtype, "memory")
    return OutputTensor(name, (size,), dtype, (reader,))


def test_one_file_has_the_plain_name_and_no_index() -> None:
    layout = lay_out([tensor("a", 3), tensor("b", 5)], 1000)
    assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    assert layout.index is None
    assert layout.shards[0].num_bytes == len(layout.shards[0].header) + 16
    assert [place.start - len(layout.shards[0].header) for place in layout.places] == [0, 6]
    assert len(layout.shards[0].header) % 64 == 0


def test_shards_are_filled_in_order_and_the_index_knows_them() -> None:
    tensors = [tensor("a", 30), tensor("b", 30), tensor("giant", 500), tensor("c", 10), tensor("d", 40)]
    layout = lay_out(tensors, 120)
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [shard.name for shard in layout.shards] == names
    assert [place.shard for place in layout.places] == [0, 0, 1, 2, 2]
    assert layout.index == {
        "metadata": {"total_size": 1220},
        "weight_map": dict(
            zip(["a", "b", "giant", "c", "d"], [names[i] for i in (0, 0, 1, 2, 2)], strict=True)
        ),
    }
    assert len(lay_out(tensors, 119).shards) == 4


def test_wider_types_come_first_so_that_elements_are_aligned() -> None:
    tensors = [tensor("bytes", 3, "uint8"), tensor("a", 3), tensor("wide", 2, "float64"), tensor("b", 1)]
    layout = lay_out(tensors, 1000)
    assert [place.tensor.name for place in layout.places] == ["wide", "a", "b", "bytes"]
    for place in layout.places:
        assert place.start % (place.num_bytes // place.tensor.size) == 0
    length = struct.unpack("<Q", layout.shards[0].header[:8])[0]
    header = json.loads(layout.shards[0].header[8 : 8 + length])
    assert header["b"] == {"dtype": "BF16", "shape": [1], "data_offsets": [22, 24]}
    assert header["__metadata__"] == {"format": "pt"}


def test_an_adapter_keeps_its_file_name() -> None:
    assert lay_out([tensor("a", 3)], 1000, "adapter_model").shards[0].name == "adapter_model.safetensors"


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="a would be written twice"):
        lay_out([tensor("a", 3), tensor("b", 3), tensor("a", 3)], 1000)


def test_no_tensors_are_an_empty_file() -> None:
    assert lay_out([], 1000).shards[0].num_bytes % 64 == 0
