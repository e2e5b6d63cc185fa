"""The configuration files that come with the recipes.

There is one copy of each, recipes/configs/NAME.yaml. A checkout reads it there; a wheel carries the same
folder as toolkit/recipe_files (setup.cfg maps the one onto the other), since recipes/ itself is not a
package.
"""

from pathlib import Path

import toolkit

PACKAGE_FOLDER = Path(toolkit.__file__).parent
FOLDERS = (PACKAGE_FOLDER / "recipe_files", PACKAGE_FOLDER.parent / "recipes" / "configs")


SHARED = {"centralized-unsloth": "centralized-hf"}
"""Recipes that differ in their backend have one file."""


def shipped_file(recipe: str) -> Path | None:
    """Return the configuration file of a recipe, or None when it has none. Dashes and underscores are the
    same."""
    recipe = recipe.replace("_", "-")
    name = SHARED.get(recipe, recipe).replace("-", "_") + ".yaml"
    return next((folder / name for folder in FOLDERS if (folder / name).is_file()), None)
