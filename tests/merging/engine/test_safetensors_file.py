"""The format: what is read is what was saved, what is written others can read, and no damaged file is believed."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from toolkit.errors import MergeError, ModelError
from toolkit.merging.streaming.safetensors_file import DTYPES, WeightsFile, header_bytes, read_header

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def pack(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def of(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_every_type_is_read_as_it_was_saved(tmp_path) -> None:
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in DTYPES.values()}
    save_file(tensors, tmp_path / "x.safetensors")
    file = WeightsFile(tmp_path / "x.safetensors")
    assert set(file.header.entries) == set(tensors)
    for name, tensor in tensors.items():
        reader = file.reader(name)
        assert (reader.dtype, reader.shape) == (name, (2, 3))
        span = reader.span(1, 4)
        assert bytes(span.data) == bytes(tensor.view(-1)[1:5].clone().view(torch.uint8).numpy())
        assert str(tmp_path) in reader.where


def test_spans_are_views_that_torch_takes_without_a_warning(tmp_path, recwarn) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    file = WeightsFile(tmp_path / "x.safetensors")
    span = file.reader("a").span(0, 4)
    torch.from_numpy(span.data)[0] = 5  # private: the file stays as it is
    assert not recwarn.list
    assert file.reader("a").span(0, 1).data[0] == 5  # a view of the same pages
    assert WeightsFile(tmp_path / "x.safetensors").reader("a").span(0, 1).data[0] == 1


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_unaligned_elements_are_read(tmp_path, shift: int) -> None:
    values = np.arange(5, dtype=np.float32)
    header = {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    text = json.dumps(header).encode()
    text += b" " * ((-(8 + len(text)) % 4) + shift)
    span = WeightsFile(of(tmp_path / "x", pack(text, values.tobytes()))).reader("a").span(1, 3)
    assert span.data.tolist() == [1, 2, 3]
    assert span.address % 4 == 0


def test_what_is_written_others_read(tmp_path) -> None:
    tensors = [("ä", "bfloat16", (3,), 6), ("b", "int64", (), 8), ("c", "float16", (0, 2), 0)]
    header = header_bytes(tensors, {"format": "pt"})
    assert len(header) % 64 == 0
    path = of(tmp_path / "x", header + bytes(14))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert [file.get_tensor(name).shape for name in ("ä", "b", "c")] == [(3,), (), (0, 2)]
    assert read_header(path).metadata == {"format": "pt"}
    assert [entry.start - len(header) for entry in read_header(path).entries.values()] == [0, 6, 14]


ATTACKS = {
    "empty file": (b"", "header"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "header"),
    "header of no bytes": (pack(b""), "header"),
    "header longer than the file": (pack(b"{}", length=3), "header"),
    "giant header": (pack(b"{}", length=1 << 62), "header"),
    "negative length": (pack(b"{}", length=(1 << 64) - 1), "header"),
    "not JSON": (pack(b"{]"), "cannot be read"),
    "not UTF-8": (pack(b'{"\xff": 1}'), "cannot be read"),
    "a list": (pack([]), "not a JSON object"),
    "deeply nested": (pack(b'{"a":' * 100_000), "cannot be read"),
    "a number of 5,000 digits": (pack(b'{"a":' + b"9" * 5000 + b"}"), "cannot be read"),
    "name twice": (
        pack(
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "'a' stands there twice",
    ),
    "key twice": (pack(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "metadata"),
    "metadata twice nested": (pack({"__metadata__": {"a": {"b": "c"}}}), "metadata"),
    "missing key": (pack({"a": {"dtype": "U8", "shape": [0]}}), "data_offsets"),
    "extra key": (pack({"a": {**GOOD["a"], "x": 1}}, bytes(8)), "exactly"),
    "entry is a list": (pack({"a": []}), "exactly"),
    "unknown type": (pack({"a": {**GOOD["a"], "dtype": "Q7"}}, bytes(8)), "'Q7'"),
    "type is a number": (pack({"a": {**GOOD["a"], "dtype": 7}}, bytes(8)), "7"),
    "float8": (pack({"a": {**GOOD["a"], "dtype": "F8_E4M3"}}, bytes(8)), "dequantize"),
    "float4": (pack({"a": {**GOOD["a"], "dtype": "F4"}}, bytes(8)), "dequantize"),
    "negative size": (pack({"a": {**GOOD["a"], "shape": [-1, -2]}}, bytes(8)), "shape"),
    "shape of text": (pack({"a": {**GOOD["a"], "shape": ["2"]}}, bytes(8)), "shape"),
    "shape of truth": (pack({"a": {**GOOD["a"], "shape": [True, 2]}}, bytes(8)), "shape"),
    "shape is a number": (pack({"a": {**GOOD["a"], "shape": 2}}, bytes(8)), "shape"),
    "shape overflows": (pack({"a": {**GOOD["a"], "shape": [1 << 62, 1 << 62]}}, bytes(8)), "takes"),
    "thousand dimensions": (pack({"a": {**GOOD["a"], "shape": [1] * 1000}}, bytes(8)), "shape"),
    "wrong size": (pack({"a": {**GOOD["a"], "shape": [3]}}, bytes(8)), "takes 8 bytes"),
    "backward offsets": (pack({"a": {**GOOD["a"], "data_offsets": [8, 0]}}, bytes(8)), "offsets"),
    "negative offsets": (pack({"a": {**GOOD["a"], "data_offsets": [-8, 0]}}, bytes(8)), "offsets"),
    "fractional offsets": (pack({"a": {**GOOD["a"], "data_offsets": [0.0, 8.0]}}, bytes(8)), "offsets"),
    "three offsets": (pack({"a": {**GOOD["a"], "data_offsets": [0, 8, 8]}}, bytes(8)), "offsets"),
    "out of range": (pack({"a": {**GOOD["a"], "data_offsets": [8, 16]}}, bytes(8)), "hole"),
    "overlap": (pack({"a": GOOD["a"], "b": {**GOOD["a"], "data_offsets": [4, 12]}}, bytes(12)), "overlap"),
    "same place": (pack({"a": GOOD["a"], "b": GOOD["a"]}, bytes(8)), "overlap"),
    "hole": (pack({"a": GOOD["a"], "b": {**GOOD["a"], "data_offsets": [12, 20]}}, bytes(20)), "hole"),
    "data cut off": (pack(GOOD, bytes(7)), "cut off"),
    "trailing bytes": (pack(GOOD, bytes(9)), "belong to no tensor"),
    "no tensors but bytes": (pack({}, bytes(1)), "belong to no tensor"),
    "empty name": (pack({"": GOOD["a"]}, bytes(8)), "called"),
    "name with a line break": (pack({"a\nb": GOOD["a"]}, bytes(8)), "called"),
    "endless name": (pack({"a" * 5000: GOOD["a"]}, bytes(8)), "called"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(100), "header"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_damaged_files_are_refused_with_their_name(tmp_path, attack: str) -> None:
    content, message = ATTACKS[attack]
    with pytest.raises(ModelError) as caught:
        read_header(of(tmp_path / "bad.safetensors", content))
    assert message in str(caught.value)
    assert "bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_sound_file_of_the_attacks_is_read(tmp_path) -> None:
    assert read_header(of(tmp_path / "x", pack(GOOD, bytes(8)))).entries["a"].num_bytes == 8
    assert read_header(of(tmp_path / "x", pack({}))).entries == {}


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ModelError, match=r"x\.safetensors"):
        read_header(path)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.data())
def test_a_header_with_changed_bytes_is_read_or_refused(tmp_path_factory, data) -> None:
    tensors = {"a": (0, 8), "b": (8, 12)}
    values = {
        n: {"dtype": "F32", "shape": [(e - s) // 4], "data_offsets": [s, e]} for n, (s, e) in tensors.items()
    }
    content = bytearray(pack(values, bytes(12)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelError:
        return
    file = WeightsFile(path)
    assert sum(entry.num_bytes for entry in header.entries.values()) <= len(content)
    for name, entry in header.entries.items():
        file.reader(name).span(0, int(np.prod(entry.shape)))


def test_a_file_that_shrinks_is_an_error_and_no_crash(tmp_path) -> None:
    save_file({"a": torch.ones(100_000)}, tmp_path / "x.safetensors")
    reader = WeightsFile(tmp_path / "x.safetensors").reader("a")
    reader.span(0, 10)
    os.truncate(tmp_path / "x.safetensors", 4096)
    with pytest.raises(MergeError, match="cut off"):
        reader.span(50_000, 10)


def test_a_file_that_was_replaced_before_it_was_read_is_an_error(tmp_path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "x.safetensors")
    reader = WeightsFile(tmp_path / "x.safetensors").reader("a")
    save_file({"a": torch.zeros(10)}, tmp_path / "y.safetensors")
    os.replace(tmp_path / "y.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(MergeError, match="changed"):
        reader.span(0, 10)


def test_a_file_that_is_replaced_while_it_is_read_stays_what_it_was(tmp_path) -> None:
    save_file({"a": torch.ones(10)}, tmp_path / "x.safetensors")
    reader = WeightsFile(tmp_path / "x.safetensors").reader("a")
    reader.span(0, 1)
    save_file({"a": torch.zeros(10)}, tmp_path / "y.safetensors")
    os.replace(tmp_path / "y.safetensors", tmp_path / "x.safetensors")
    assert reader.span(0, 10).data.tolist() == [1.0] * 10
