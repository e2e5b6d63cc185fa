"""One folder for what can be fetched or computed again, whoever asks."""

from pathlib import Path

import pytest

from toolkit.cache_folder import cache_folder
from toolkit.data import cache
from toolkit.launch import deepspeed

HOME = Path.home()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, HOME / ".cache" / "meldkit"),
        ({"MELDKIT_CACHE": "/mine"}, Path("/mine")),
        ({"MELDKIT_CACHE": "~/mine", "XDG_CACHE_HOME": "/shared"}, HOME / "mine"),
        ({"XDG_CACHE_HOME": "/shared"}, Path("/shared/meldkit")),
        ({"XDG_CACHE_HOME": "~/shared"}, HOME / "shared" / "meldkit"),
        ({"XDG_CACHE_HOME": "here", "MELDKIT_CACHE": ""}, HOME / ".cache" / "meldkit"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: Path) -> None:
    for name in ("MELDKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == cache_folder(environ) == expected
    assert cache.cache_folder(None) == expected / "tokenised"
    assert deepspeed.environment("cpu", environ)["TORCH_EXTENSIONS_DIR"] == str(expected / "torch_extensions")
