import configparser
from pathlib import Path

import pytest

from toolkit.config import shipped
from toolkit.config.load import load
from toolkit.config.recipes import RECIPES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_found_by_its_name_and_loads(path):
    name = path.stem.replace("_", "-")
    config_class = RECIPES.get({"demo": "iterative-merge"}.get(name, name), RECIPES["centralized-hf"])
    assert load(config_class, ["--config", name]).config_file == path


def test_a_wheel_carries_the_same_folder(tmp_path, monkeypatch):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "toolkit.recipe_files" in setup["options"]["packages"].split()
    assert "toolkit.recipe_files = recipes/configs" in setup["options"]["package_dir"].splitlines()
    assert setup["options.package_data"]["toolkit.recipe_files"] == "*.yaml"
    assert shipped.FOLDERS[0] == shipped.PACKAGE_FOLDER / "recipe_files"


def test_a_recipe_without_a_file_has_none():
    assert shipped.shipped_file("nowhere") is None
