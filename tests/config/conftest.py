from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.config.load import Loaded, load
from toolkit.config.recipes import CentralizedConfig
from toolkit.errors import ConfigError

REQUIRED = ["--model", "m", "--data", "d.json", "--output-dir", "o"]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded[CentralizedConfig]]:
    """Load a configuration that has what is required, from further flags and perhaps a file run.yaml."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str, file: str | None = None) -> Loaded[CentralizedConfig]:
        argv = [*REQUIRED, *flags]
        if file is not None:
            (tmp_path / "run.yaml").write_text(file, encoding="utf-8")
            argv = ["--config", "run.yaml", *argv]
        return load(CentralizedConfig, argv)

    return call


@pytest.fixture
def problems(loaded: Callable[..., Loaded[CentralizedConfig]]) -> Callable[..., list[str]]:
    """Return the problems of a configuration that has what is required."""

    def call(*flags: str, file: str | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            loaded(*flags, file=file)
        return caught.value.problems

    return call
