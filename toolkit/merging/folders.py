"""Merging models that lie in folders, from Python: what ``meldkit merge`` does without its command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from toolkit.config.yaml_tree import parse_tree
from toolkit.merging.recipes.recipe_file import build, read
from toolkit.merging.recipes.resolve import PlanOptions, plan_merge
from toolkit.merging.streaming.engine import EngineOptions, execute
from toolkit.merging.streaming.report import Report


def merge_folders(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    plan_options: PlanOptions | None = None,
    engine_options: EngineOptions | None = None,
) -> Report:
    """Merge models into the new folder ``out``, streamed from file to file.

    Args:
        recipe: a recipe file, or its content, e.g. ``{"merge_method": "linear", "models": [{"model": "a", "parameters":
            {"weight": 0.5}}, ...]}``.
        out: folder of the result; it is complete or not there.
        plan_options: seed, missing tensors, tokenizer, card.
        engine_options: threads, backend, resuming, verifying, progress.

    Returns:
        The report that also lies in the folder as merge_report.json.

    Raises:
        ConfigError, ModelError, RunDirectoryError: wrong input; nothing was written.
        MergeError: no sound result; nothing final-named was written.
        Interrupted: SIGINT or SIGTERM; ``EngineOptions(resume=True)`` goes on.
    """
    if isinstance(recipe, Mapping):
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        tree, problems = parse_tree(text, "recipe")
        resolved = build(tree, text, "recipe", lenient=False, problems=problems)
    else:
        resolved = read(recipe)
    return execute(plan_merge(resolved, plan_options), Path(out), engine_options)
