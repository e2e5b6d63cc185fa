"""The recipe that flags describe, as the YAML that a recipe file would hold."""

import re
from typing import Any

import yaml

from toolkit.config.merge_command import RecipeOptions
from toolkit.config.names import did_you_mean
from toolkit.config.yaml_tree import parse_tree
from toolkit.errors import ConfigError
from toolkit.merging.recipes.recipe import MergeRecipe
from toolkit.merging.recipes.recipe_file import build
from toolkit.merging.registry import MergeMethod, merge_methods

NAME = "the command line"
# Parameters with a flag of their own.
FLAGS = {"weight": "--weights", "density": "--density", "fisher": "--fisher"}


def recipe_of_flags(options: RecipeOptions, *, lenient: bool) -> MergeRecipe:
    """Build and check the recipe. Raises ConfigError."""
    methods = merge_methods()
    problems: list[str] = []
    if options.method not in methods:
        advice = did_you_mean(options.method or "", methods) or f"; there are {', '.join(sorted(methods))}"
        problems.append(f"--method: no merge method '{options.method}'{advice}")
    if not options.models:
        problems.append("--models is missing: --models A B C")
    problems += _wrong_lengths(options)
    if problems:
        raise ConfigError(problems)
    text = yaml.safe_dump(
        _contents(options, methods[str(options.method)]), sort_keys=False, allow_unicode=True
    )
    try:
        tree, _ = parse_tree(text, NAME)
        return build(tree, text, NAME, lenient=lenient)
    except ConfigError as error:
        found = dict.fromkeys(_of_flags(problem) for problem in error.problems)
        raise ConfigError(list(found), hint=error.hint) from None


def _wrong_lengths(options: RecipeOptions) -> list[str]:
    count = len(options.models)
    found = []
    for name, values in (
        ("weights", options.weights),
        ("density", options.density),
        ("fisher", options.fisher),
    ):
        allowed = {0, count, 1} if name == "density" else {0, count}
        if count and len(values) not in allowed:
            found.append(f"--{name}: {len(values)} values for {count} models")
    return found


def _contents(options: RecipeOptions, method: MergeMethod) -> dict[str, Any]:
    models = []
    weights = options.weights
    if not weights and any(p.name == "weight" and p.per_model for p in method.parameters):
        weights = [1.0] * len(options.models)
    density = options.density if len(options.density) > 1 else []
    columns = {"weight": weights, "density": density, "fisher": options.fisher}
    for index, model in enumerate(options.models):
        own = {name: values[index] for name, values in columns.items() if values}
        models.append({"model": model, **({"parameters": own} if own else {})})
    shared = dict(options.param)
    if len(options.density) == 1:
        shared["density"] = options.density[0]
    base = options.base
    if base is None and method.base_is_a_model:
        base = options.models[0]
    contents = {
        "merge_method": method.name,
        "base_model": base,
        "models": models,
        "parameters": shared,
        "dtype": options.dtype,
        "tokenizer_source": options.tokenizer_source,
    }
    return {name: value for name, value in contents.items() if value not in (None, {})}


def _of_flags(problem: str) -> str:
    """A problem of the recipe in the words of the flags."""

    def needs(match: re.Match[str]) -> str:
        return f"needs {FLAGS.get(match[1], f'--param {match[1]}=VALUE')}"

    problem = re.sub(rf"^{NAME}(:\d+)?: ", "", problem)
    problem = problem.replace("base_model", "--base").replace("merge_method", "--method")
    return re.sub(r"needs the parameter '(\w+)'.*", needs, problem)
