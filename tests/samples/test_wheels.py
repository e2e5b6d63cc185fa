"""Wheels are fetched with the real pip, from a folder instead of a network."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import zipfile

import pytest

from toolkit import durable, wheels
from toolkit.errors import MeldkitError
from toolkit.wheels import Wheel

FETCH = """
import dataclasses, json, sys
from toolkit import wheels
print(wheels.unpacked(wheels.Wheel(**json.loads(sys.argv[1])), announce=print))
"""


def test_wanted_files_are_unpacked_and_nothing_else(index, tmp_path):
    lines = []
    wheel = index.add(
        {"data/a.txt": b"a", "data/deep/b.bin": b"\x00b", "code/__init__.py": b"raise SystemExit"}
    )
    folder = wheels.unpacked(wheel, announce=lines.append)
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del files["manifest.json"]
    assert files == {"data/a.txt": b"a", "data/deep/b.bin": b"\x00b"}
    assert lines == ["Fetching meldkit-sample 1.0 (0.0 MB) ..."]
    assert not list((tmp_path / "cache" / "wheels").glob(".staging*"))


def test_a_second_call_needs_neither_pip_nor_index(index, monkeypatch):
    wheel = index.add({"data/a.txt": b"a"})
    first = wheels.unpacked(wheel)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert wheels.unpacked(wheel) == first


def test_a_cache_that_cannot_be_used_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MELDKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        MeldkitError, match=r"the cache .*file/cache cannot be used \(Not a directory\)"
    ) as error:
        wheels.unpacked(index.add({"data/a.txt": b"a"}))
    assert "set MELDKIT_CACHE" in str(error.value)


def test_a_damaged_cache_is_fetched_again(index):
    wheel = index.add({"data/a.txt": b"a"})
    (wheels.unpacked(wheel) / "data" / "a.txt").write_bytes(b"changed")
    assert (wheels.unpacked(wheel) / "data" / "a.txt").read_bytes() == b"a"


def test_another_file_than_the_pinned_one_is_not_used(index, tmp_path):
    wheel = dataclasses.replace(index.add({"data/a.txt": b"a"}), sha256="0" * 64)
    with pytest.raises(MeldkitError, match="not the file that meldkit was tested with"):
        wheels.unpacked(wheel)
    assert not list((tmp_path / "cache" / "wheels").glob("*/"))


def test_without_a_network_the_error_says_what_to_do(index):
    wheel = Wheel("meldkit-nowhere", "1.0", "0" * 64, 0, "MIT", ("data/*",))
    with pytest.raises(MeldkitError, match=r"cannot fetch meldkit-nowhere==1\.0") as caught:
        wheels.unpacked(wheel)
    assert "No matching distribution" in caught.value.message
    assert "pip install --no-deps" in (caught.value.hint or "")


def test_without_pip_the_error_says_so(index, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MeldkitError, match="has no pip") as caught:
        wheels.unpacked(index.add({"data/a.txt": b"a"}))
    assert "ensurepip" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["data/../../outside.txt", "/data/outside.txt", "data\\..\\outside.txt"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    archive = tmp_path / "bad.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        member = zipfile.ZipInfo("x")
        member.filename = name
        opened.writestr(member, "x")
    with pytest.raises(MeldkitError, match="refusing to unpack"):
        wheels.unpack(archive, ("*",), tmp_path / "inside")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.whl"]


def test_a_missing_member_is_an_error(index):
    with pytest.raises(MeldkitError, match="holds no file data/"):
        wheels.unpacked(index.add({"other/a.txt": b"a"}))


def test_two_processes_fetch_once(index):
    import json

    wheel = index.add({"data/a.txt": b"a" * 1000})
    arguments = [sys.executable, "-c", FETCH, json.dumps(dataclasses.asdict(wheel))]
    running = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum(line.startswith("Fetching") for lines in outputs for line in lines) == 1


def test_an_installed_package_is_used_in_place(index):
    version = importlib.metadata.version("hassil")
    wheel = Wheel("hassil", version, "0" * 64, 0, "Apache-2.0", ("hassil/__init__.py",))
    assert (wheels.unpacked(wheel) / "hassil" / "sample.py").is_file()
    with pytest.raises(MeldkitError):
        wheels.unpacked(dataclasses.replace(wheel, version="0.0.1"))


def test_a_killed_fetch_leaves_nothing_that_counts(index, tmp_path):
    wheel = index.add({"data/a.txt": b"a"})
    leftover = tmp_path / "cache" / "wheels" / f"{durable.STAGING_PREFIX}meldkit-sample-1.0-12345678"
    (leftover / "files" / "data").mkdir(parents=True)
    folder = wheels.unpacked(wheel)
    assert (folder / "data" / "a.txt").read_bytes() == b"a"
    assert not leftover.exists()
