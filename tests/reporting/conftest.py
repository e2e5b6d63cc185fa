import importlib.util
import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from toolkit.config.recipes import CentralizedConfig

FAKE_RUN = Path(__file__).parent / "fake_run.py"
FAKE_ROUNDS = Path(__file__).parent / "fake_rounds.py"


VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"meldkit_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_run() -> ModuleType:
    """The script that makes synthetic records, as a module."""
    return load_script(FAKE_RUN)


@pytest.fixture(scope="session")
def fake_run_path() -> Path:
    return FAKE_RUN


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., CentralizedConfig]:
    def make(**options: Any) -> CentralizedConfig:
        options = {"report_to": [], "output_dir": tmp_path / "run", **options}
        return CentralizedConfig(model="m", data="d", **options)

    return make


@pytest.fixture(scope="session")
def read_strict() -> Callable[[Path], Any]:
    """Read a JSON file; NaN and Infinity, which Python alone would take, are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return lambda path: json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="session")
def fake_rounds_path() -> Path:
    return FAKE_ROUNDS


@pytest.fixture(scope="session")
def fake_rounds() -> ModuleType:
    """The script that makes the records of a run in rounds, as a module."""
    return load_script(FAKE_ROUNDS)


@pytest.fixture(scope="session")
def page_of() -> Callable[[str], Page]:
    """An HTML text as a page that can be asked for its elements."""
    return Page
