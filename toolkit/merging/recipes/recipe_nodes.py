"""The parts of a recipe file that occur in many places: model references, parameters, names. Problems are collected."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from toolkit.config.names import did_you_mean
from toolkit.config.values import shown
from toolkit.config.yaml_tree import Node
from toolkit.merging.recipes.parameters import parameter_names
from toolkit.merging.recipes.recipe import Condition, Location, ModelReference, Setting, Settings, location

DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}
ItemT = TypeVar("ItemT")


class NodeReader:
    """Reads nodes of a recipe.

    Args:
        file_name: for messages.
        lenient: unknown names are notes.
        problems: found so far; more are added, each with file and line.
    """

    def __init__(self, file_name: str, lenient: bool, problems: list[str]) -> None:
        self.file_name = file_name
        self.lenient = lenient
        self.problems = problems
        self.notes: list[str] = []
        self.num_unknown = 0

    # --- models

    def reference(self, node: Node | None, above: Node | None = None) -> ModelReference | None:
        """Text, or a mapping {model: {path, revision}, lora}. ``above`` is named where it is missing."""
        if node is None or node.value is None:
            self.problem(node or above, "model is missing: a folder or a hub id")
            return None
        if isinstance(node.value, list):
            self.problem(node, "a list; one folder or hub id is expected")
            return None
        try:
            if not isinstance(node.value, dict):
                return ModelReference.parse(node.text)
        except ValueError as error:
            self.problem(node, str(error))
            return None
        if "path" in node.pairs:  # the short form of {model: {path: ...}}
            found = self.location(node)
            return found and ModelReference(found)
        keys = self.keys(node, ("model", "lora", "override_architecture"), "model.")
        if keys.get("override_architecture") is not None:
            place = self.place(keys["override_architecture"])
            self.notes.append(f"{place}: override_architecture has no effect; tensors are matched by name")
        model = self.location(keys.get("model"), node)
        lora = keys.get("lora")
        nodes = [] if lora is None or lora.value is None else lora.items or [lora]
        loras = tuple(found for child in nodes if (found := self.location(child)))
        return model and ModelReference(model, loras)

    def location(self, node: Node | None, above: Node | None = None) -> Location | None:
        if node is None or node.value is None or isinstance(node.value, list):
            self.problem(node or above, "a folder or a hub id is expected")
            return None
        try:
            if not isinstance(node.value, dict):
                return location(node.text)
        except ValueError as error:
            self.problem(node, str(error))
            return None
        keys = self.keys(node, ("path", "revision"), "model.")
        path = self.text(keys.get("path"), "path")
        if path is None:
            self.problem(node, "path is missing")
        return Location(path, self.text(keys.get("revision"), "revision")) if path else None

    # --- parameters

    def settings(self, node: Node | None) -> Settings:
        if node is None or node.value is None:
            return {}
        if not isinstance(node.value, dict):
            self.problem(node, "parameters is a mapping of names to values")
            return {}
        found = {name: self.setting(name, child) for name, child in node.pairs.items()}
        return {name: setting for name, setting in found.items() if setting is not None}

    def setting(self, name: str, node: Node) -> Setting | None:
        children = node.items if isinstance(node.value, list) else [node]
        are_mappings = [isinstance(child.value, dict) for child in children]
        if not children:
            self.problem(node, f"{name}: the list is empty")
        elif all(are_mappings):
            conditions = [self.condition(name, child) for child in children]
            return Setting(tuple(c for c in conditions if c is not None), self.place(node))
        elif any(are_mappings):
            self.problem(node, f"{name}: a list has either values, or value and filter in each element")
        else:
            value = self.value(name, node)
            return None if value is None else Setting((Condition(value),), self.place(node))
        return None

    def condition(self, name: str, node: Node) -> Condition | None:
        keys = self.keys(node, ("value", "filter"), f"{name}.")
        value = self.value(name, keys.get("value") or Node(None, "", node.line))
        wanted = self.text(keys.get("filter"), "filter")
        return None if value is None else Condition(value, None if wanted in (None, "*") else wanted)

    def value(self, name: str, node: Node) -> Any:
        """A scalar, or a tuple of scalars."""
        if isinstance(node.value, list):
            if node.value and all(isinstance(child.value, bool | int | float | str) for child in node.value):
                return tuple(child.value for child in node.value)
        elif isinstance(node.value, bool | int | float | str):
            return node.value
        self.problem(node, f"{name}: {shown(node.plain)} is not a value or a list of values")
        return None

    # --- small things

    def place(self, node: Node) -> str:
        return f"{self.file_name}:{node.line}"

    def problem(self, node: Node | None, text: str) -> None:
        self.problems.append(f"{self.place(node)}: {text}" if node else f"{self.file_name}: {text}")

    def unknown(self, text: str) -> None:
        """A name that nothing here reads."""
        self.num_unknown += not self.lenient
        (self.notes if self.lenient else self.problems).append(text)

    def keys(self, node: Node, valid: tuple[str, ...], above: str) -> Mapping[str, Node]:
        """The keys of a mapping; those that are not valid are problems (notes, where lenient)."""
        if not isinstance(node.value, dict):
            names = ", ".join(valid)
            self.problem(
                node, f"{above.rstrip('.') or 'the file'}: {shown(node.plain)} is not a mapping of {names}"
            )
            return {}
        for name, child in node.pairs.items():
            if name in valid:
                continue
            if "parameters" in valid and name in parameter_names():
                advice = f"; '{name}' belongs under 'parameters:'"
            else:
                advice = did_you_mean(name, valid)
            self.unknown(f"{self.place(child)}: unknown key '{above}{name}'{advice}")
        return {name: child for name, child in node.pairs.items() if name in valid}

    def each(self, node: Node | None, name: str, make: Callable[[Node], ItemT | None]) -> tuple[ItemT, ...]:
        if node is None:
            return ()
        if not isinstance(node.value, list) or not node.value:
            self.problem(node, f"{name} is a list with at least one element")
            return ()
        return tuple(item for child in node.value if (item := make(child)) is not None)

    def optional(self, node: Node | None, make: Callable[[Node], ItemT | None]) -> ItemT | None:
        return None if node is None or node.value is None else make(node)

    def text(self, node: Node | None, name: str) -> str | None:
        if node is None or node.value is None:
            return None
        if isinstance(node.value, list | dict):
            self.problem(node, f"{name}: {shown(node.plain)} is not text")
            return None
        return node.text

    def dtype(self, node: Node | None, name: str) -> str | None:
        text = self.text(node, name)
        if text is None or node is None:
            return None
        dtype = DTYPES.get(text.removeprefix("torch."))
        if dtype is None:
            names = [known for known, meant in DTYPES.items() if known == meant]
            self.problem(
                node, f"{name}: '{text}' is not one of {', '.join(names)}{did_you_mean(text, names)}"
            )
        return dtype
