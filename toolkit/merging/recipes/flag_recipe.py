"""The recipe that flags describe, as the YAML that a recipe file would hold."""

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import yaml

from toolkit.config.merge_command import RecipeOptions
from toolkit.config.names import did_you_mean
from toolkit.config.yaml_tree import Node, parse_tree
from toolkit.errors import ConfigError
from toolkit.merging.recipes.recipe import MergeRecipe, Settings
from toolkit.merging.recipes.recipe_file import build
from toolkit.merging.registry import MergeMethod, merge_methods

NAME = "the command line"
# Parameters with a flag of their own.
FLAGS = {"weight": "--weights", "density": "--density", "fisher": "--fisher"}
# Keys of a recipe with another name than their flag.
KEYS = {"merge_method": "--method", "base_model": "--base", "tokenizer_source": "--tokenizer-source"}
# Sentences of recipe_checks.py that name keys of a recipe, which are flags here.
REWORDED = (
    (r"^(\w+ needs|\w+ takes [\w ]+ beside) base_model,", r"\1 --base,"),
    (r"^(\w+ takes .*) with base_model$", r"\1 with --base"),
    (r"^base_model (.* is merged too, .*, or leave) base_model out$", r"--base \1 it out"),
    (r"^('(\w+)' is one value for all models);.*", r"\1: --param \2=VALUE"),
)


def recipe_of_flags(options: RecipeOptions, *, lenient: bool, base_is_apart: bool = False) -> MergeRecipe:
    """Build and check the recipe, as :func:`toolkit.merging.recipes.recipe_file.read`. Raises ConfigError."""
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
    tree, _ = parse_tree(text, NAME)
    flag_at = _flag_at(tree)
    try:
        recipe = build(tree, text, NAME, lenient=lenient, base_is_apart=base_is_apart)
    except ConfigError as error:
        found = dict.fromkeys(_of_flags(problem, flag_at) for problem in error.problems)
        raise ConfigError(list(found), hint=error.hint) from None
    return _with_flags(recipe, flag_at)


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


# --- places: flags in the place of lines

FlagAt = Callable[[int], str]


def _flag_at(tree: Node) -> FlagAt:
    """The flag that a line of the recipe comes from."""
    flags = {node.line: KEYS.get(key, f"--{key.replace('_', '-')}") for key, node in tree.pairs.items()}
    entries = tree.pairs["models"].items
    flags |= {entry.line: "--models" for entry in entries}
    for holder in (tree, *entries):
        parameters = holder.pairs.get("parameters")
        for name, node in (parameters.pairs if parameters else {}).items():
            flags[node.line] = FLAGS.get(name, f"--param {name}")
    lines = sorted(flags)
    return lambda line: flags[lines[bisect_right(lines, line) - 1]]


def _of_place(place: str, flag_at: FlagAt) -> str:
    return re.sub(rf"^{NAME}:(\d+)", lambda match: flag_at(int(match[1])), place)


def _with_flags(recipe: MergeRecipe, flag_at: FlagAt) -> MergeRecipe:
    def settings(given: Settings) -> Settings:
        return {
            name: dataclasses.replace(setting, place=_of_place(setting.place, flag_at))
            for name, setting in given.items()
        }

    models = [
        dataclasses.replace(
            entry, parameters=settings(entry.parameters), place=_of_place(entry.place, flag_at)
        )
        for entry in recipe.models
    ]
    tokenizer = recipe.tokenizer
    return dataclasses.replace(
        recipe,
        models=tuple(models),
        parameters=settings(recipe.parameters),
        tokenizer=tokenizer and dataclasses.replace(tokenizer, place=_of_place(tokenizer.place, flag_at)),
        notes=tuple(_of_flags(note, flag_at) for note in recipe.notes),
    )


def _of_flags(problem: str, flag_at: FlagAt) -> str:
    """A problem of the recipe in the words of the flags. Anchored, so that no name of a model is changed."""

    def needs(match: re.Match[str]) -> str:
        return f"{match[1]} needs {FLAGS.get(match[2], f'--param {match[2]}=VALUE')}"

    place, problem = re.fullmatch(rf"({NAME}(?::\d+)?: )?(.*)", problem, re.DOTALL).groups()  # type: ignore[union-attr]  # it matches any text
    problem, is_whole = re.subn(r"^(\w+) needs the parameter '(\w+)'.*", needs, problem)
    for pattern, words in REWORDED:
        problem = re.sub(pattern, words, problem)
    if place is None or place == f"{NAME}: " or is_whole:
        return problem
    flag = _of_place(place, flag_at).removesuffix(": ")
    for name in (*(name for name, own in FLAGS.items() if own == flag), flag.split()[-1].lstrip("-")):
        problem = problem.removeprefix(f"{name}: ")
    return f"{flag}: {problem}"
