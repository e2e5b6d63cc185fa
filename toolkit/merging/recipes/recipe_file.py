"""Read a recipe file: mergekit's YAML with our additions, strictly, every problem at once with its file and line."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from toolkit.config.names import did_you_mean
from toolkit.config.values import shown
from toolkit.config.yaml_tree import Node, read_tree
from toolkit.errors import ConfigError
from toolkit.merging.recipes.recipe import (
    InputModel,
    InputSlice,
    MergeRecipe,
    ModelReference,
    OutputModule,
    OutputSlice,
    TokenizerRequest,
    TokenSource,
)
from toolkit.merging.recipes.recipe_checks import check_settings
from toolkit.merging.recipes.recipe_nodes import NodeReader
from toolkit.merging.registry import merge_methods

RECIPE_KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "dtype",
    "out_dtype",
    "parameters",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
TOKEN_KINDS = ("zero", "model_token")


def read(path: str | Path, *, lenient: bool = False, base_is_apart: bool = False) -> MergeRecipe:
    """Read and check a recipe.

    Args:
        lenient: unknown keys and parameters are notes, as mergekit passes over them; else they are problems.
        base_is_apart: base_model takes what merged adapters leave over, and is none of the models that are merged.

    Raises:
        ConfigError: every problem, with file and line and the nearest valid name.
    """
    tree, problems, text = read_tree(path)
    return build(tree, text, str(path), lenient=lenient, base_is_apart=base_is_apart, problems=problems)


def build(
    tree: Node,
    text: str,
    name: str,
    *,
    lenient: bool,
    base_is_apart: bool = False,
    problems: Iterable[str] = (),
) -> MergeRecipe:
    """The recipe that a tree describes, as :func:`read` of a file. ``name`` is the file in messages."""
    builder = _Builder(name, lenient, list(problems))
    recipe = builder.recipe(tree, text)
    unknown, wrong = check_settings(dataclasses.replace(recipe, base_model=None) if base_is_apart else recipe)
    builder.problems += wrong
    for text in unknown:
        builder.unknown(text)
    if builder.problems:
        hint = "--lenient passes over names that nothing here knows" if builder.num_unknown else None
        raise ConfigError(sorted(builder.problems, key=_line), hint=hint)
    return dataclasses.replace(recipe, notes=tuple(builder.notes))


def _line(problem: str) -> int:
    match = re.match(r".*?:(\d+): ", problem)
    return int(match[1]) if match else 0


class _Builder(NodeReader):
    """Turns the tree into the recipe."""

    # --- the top level

    def recipe(self, tree: Node, text: str) -> MergeRecipe:
        keys = self.keys(tree, RECIPE_KEYS, "")
        method = self.method(keys.get("merge_method"), tree)
        kinds = [name for name in ("models", "slices", "modules") if keys.get(name) is not None]
        if len(kinds) != 1:
            given = f"'{kinds[0]}' and '{kinds[1]}' are given" if kinds else "none of them is given"
            self.problem(
                keys[kinds[1]] if kinds else tree, f"one of models, slices and modules is needed; {given}"
            )
        return MergeRecipe(
            name=self.file_name,
            text=text,
            merge_method=method,
            models=self.models(keys.get("models")),
            slices=self.slices(keys.get("slices")),
            modules=self.modules(keys.get("modules")),
            base_model=self.optional(keys.get("base_model"), self.reference),
            dtype=self.dtype(keys.get("dtype"), "dtype"),
            out_dtype=self.dtype(keys.get("out_dtype"), "out_dtype"),
            tokenizer=self.tokenizer(keys.get("tokenizer_source"), keys.get("tokenizer")),
            chat_template=self.text(keys.get("chat_template"), "chat_template"),
            parameters=self.settings(keys.get("parameters")),
        )

    def method(self, node: Node | None, tree: Node) -> str:
        name = self.text(node, "merge_method")
        if name is None:
            self.problem(tree, "merge_method is missing; linear is the plain weighted mean")
        elif name not in merge_methods():
            self.problem(node or tree, f"no merge method '{name}'{did_you_mean(name, merge_methods())}")
        return name or ""

    # --- what is below

    def models(self, node: Node | None) -> tuple[InputModel, ...]:
        return self.each(node, "models", self.model)

    def model(self, node: Node) -> InputModel | None:
        keys = self.keys(node, ("model", "parameters"), "models.")
        reference = self.reference(keys.get("model"), node)
        settings = self.settings(keys.get("parameters"))
        return reference and InputModel(reference, settings, self.place(node))

    def modules(self, node: Node | None) -> dict[str, OutputModule]:
        if node is not None and not isinstance(node.value, dict):
            self.problem(node, "modules is a mapping of names")
        return {name: self.module(child) for name, child in (node.pairs if node else {}).items()}

    def module(self, node: Node) -> OutputModule:
        keys = self.keys(node, ("models", "slices", "parameters"), "modules.")
        if (keys.get("models") is None) == (keys.get("slices") is None):
            self.problem(node, "a module has either models or slices")
        settings = self.settings(keys.get("parameters"))
        return OutputModule(
            self.models(keys.get("models")), self.slices(keys.get("slices")), settings, self.place(node)
        )

    def slices(self, node: Node | None) -> tuple[OutputSlice, ...]:
        return self.each(node, "slices", self.output_slice)

    def output_slice(self, node: Node) -> OutputSlice | None:
        keys = self.keys(node, ("sources", "base_model", "residual_weight", "parameters"), "slices.")
        if keys.get("residual_weight") is not None:
            self.notes.append(
                f"{self.place(keys['residual_weight'])}: residual_weight has no effect, as in mergekit"
            )
        if keys.get("sources") is None:
            self.problem(node, "a slice has sources")
            return None
        sources = self.each(keys["sources"], "sources", self.source)
        lengths = {source.stop - source.start for source in sources}
        if len(lengths) > 1:
            counts = ", ".join(f"{s.stop - s.start} of {s.model}" for s in sources)
            self.problem(
                keys["sources"], f"the sources of a slice have the same number of layers, not {counts}"
            )
        base = self.optional(keys.get("base_model"), self.reference)
        settings = self.settings(keys.get("parameters"))
        return (
            OutputSlice(sources, base, settings, self.place(node)) if sources and len(lengths) == 1 else None
        )

    def source(self, node: Node) -> InputSlice | None:
        keys = self.keys(node, ("model", "layer_range", "parameters"), "sources.")
        reference = self.reference(keys.get("model"), node)
        settings = self.settings(keys.get("parameters"))
        bounds = keys.get("layer_range")
        numbers = bounds.plain if bounds else None
        if not (isinstance(numbers, list) and len(numbers) == 2 and all(type(n) is int for n in numbers)):
            self.problem(bounds or node, "layer_range is [FIRST, END], e.g. [0, 16] for the layers 0 to 15")
            return None
        start, stop = numbers
        if not 0 <= start < stop:
            self.problem(bounds or node, f"layer_range: [{start}, {stop}] has no layer; END is not included")
            return None
        return reference and InputSlice(reference, start, stop, settings, self.place(node))

    # --- tokenizer

    def tokenizer(self, short: Node | None, node: Node | None) -> TokenizerRequest | None:
        short = None if short is None or short.value is None else short
        node = None if node is None or node.value is None else node
        if short is not None and node is not None:
            self.problem(
                node, "tokenizer and tokenizer_source are both given; tokenizer.source says the same"
            )
        if short is not None:
            source = self.tokenizer_source(short)
            return TokenizerRequest(source, {}, None, self.place(short)) if source else None
        if node is None:
            return None
        keys = self.keys(node, ("source", "tokens", "pad_to_multiple_of"), "tokenizer.")
        source = self.tokenizer_source(keys["source"]) if keys.get("source") is not None else "union"
        tokens = keys.get("tokens") or Node({}, "", node.line)
        found = {token: self.token(child) for token, child in tokens.pairs.items()}
        multiple = keys["pad_to_multiple_of"].value if "pad_to_multiple_of" in keys else None
        if multiple is not None and not (type(multiple) is int and multiple > 0):
            self.problem(
                keys["pad_to_multiple_of"], f"pad_to_multiple_of: {shown(multiple)} is not a number above 0"
            )
        known = {token: entry for token, entry in found.items() if entry}
        return TokenizerRequest(source, known, multiple, self.place(node)) if source else None

    def tokenizer_source(self, node: Node) -> str | ModelReference | None:
        if node.value in ("union", "base"):
            return node.text
        if isinstance(node.value, str) and node.value.startswith("model:"):  # mergekit's first form
            node = Node(node.value[6:], node.value[6:], node.line)
        return self.reference(node)

    def token(self, node: Node) -> TokenSource | None:
        keys = self.keys(node, ("source", "force"), "tokens.")
        force = keys["force"].value if keys.get("force") else False
        if not isinstance(force, bool):
            self.problem(keys["force"], f"force: {shown(force)} is not true or false")
        source = keys.get("source")
        place = self.place(node)
        if source is None or source.value is None:
            return TokenSource("default", None, None, None, force, place)
        if not isinstance(source.value, dict) or "kind" not in source.pairs:
            model = self.reference(source)
            return model and TokenSource("model", model, None, None, force, place)
        kind = source.pairs["kind"].text
        if kind == "zero":
            self.keys(source, ("kind",), "source.")
            return TokenSource("zero", None, None, None, force, place)
        if kind != "model_token":
            self.problem(
                source, f"kind: '{kind}' is not one of zero, model_token{did_you_mean(kind, TOKEN_KINDS)}"
            )
            return None
        inner = self.keys(source, ("kind", "model", "token", "token_id"), "source.")
        model = self.reference(inner.get("model"), source)
        token, number = self.text(inner.get("token"), "token"), inner.get("token_id")
        if (token is None) == (number is None):
            self.problem(source, "a model_token has either token or token_id")
            return None
        if number is not None and type(number.value) is not int:
            self.problem(number, f"token_id: {shown(number.plain)} is not a whole number")
            return None
        return model and TokenSource("model_token", model, token, number and number.value, force, place)
