"""A YAML or JSON file as a tree whose every value knows its line: for files that nest, such as merge recipes.

Scalars mean what they mean in yaml_file.py. Anchors, aliases and merge keys (``<<``) are followed, as recipes in the
wild have them; an alias inside its own anchor and one that unfolds into a huge tree are errors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolkit.config.yaml_file import YamlProblem, compose, joined_surrogates, read_text, scalar
from toolkit.errors import ConfigError

MAX_TREE_DEPTH = 24
MAX_NODES = 100_000
MERGE_KEY = "<<"


@dataclass(frozen=True, slots=True)
class Node:
    """One value.

    Attributes:
        value: None, bool, int, float or str; a list of nodes; or a dict of nodes by name.
        text: a scalar as it was written.
        line: of its key; of an element of a list, of the element.
    """

    value: Any
    text: str
    line: int

    @property
    def plain(self) -> Any:
        """The value without lines."""
        if isinstance(self.value, list):
            return [node.plain for node in self.value]
        if isinstance(self.value, dict):
            return {name: node.plain for name, node in self.value.items()}
        return self.value

    @property
    def items(self) -> "list[Node]":
        """The elements of a list."""
        return self.value if isinstance(self.value, list) else []

    @property
    def pairs(self) -> "dict[str, Node]":
        """The nodes of a mapping."""
        return self.value if isinstance(self.value, dict) else {}


def read_tree(path: str | Path) -> tuple[Node, list[str], str]:
    """Read a file.

    Returns:
        The tree, the problems found (``merge.yml:3: ...``), and the text of the file.

    Raises:
        ConfigError: the file is not there, cannot be read, or is not YAML.
    """
    try:
        text = read_text(path)
        tree, problems = parse_tree(text, str(path))
    except YamlProblem as problem:
        place = f"{path}:{problem.line}" if problem.line else str(path)
        raise ConfigError([f"{place}: {problem}"]) from None
    return tree, problems, text


def parse_tree(text: str, file_name: str) -> tuple[Node, list[str]]:
    """Parse the text of a file; ``file_name`` is used in messages only. Raises YamlProblem."""
    builder = _Builder(file_name)
    root = compose(text, max_depth=MAX_TREE_DEPTH, aliases=True)
    return builder.node(root, root.start_mark.line + 1, ()), builder.problems


class _Builder:
    def __init__(self, file_name: str) -> None:
        self.file_name = file_name
        self.problems: list[str] = []
        self.num_nodes = 0

    def node(self, node: yaml.Node, line: int, above: tuple[int, ...]) -> Node:
        """``above``: identities of the nodes that this one lies in."""
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise YamlProblem(f"unfolds into more than {MAX_NODES:,} values", line)
        if id(node) in above:
            raise YamlProblem("an alias stands inside its own anchor", line)
        if isinstance(node, yaml.ScalarNode):
            text = joined_surrogates(node.value, line) if node.style is not None else node.value
            return Node(text if node.style is not None else scalar(text), text, line)
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            return Node(
                [self.node(child, child.start_mark.line + 1, above) for child in node.value], "", line
            )
        assert isinstance(node, yaml.MappingNode)
        return Node(self.pairs(node, above), "", line)

    def pairs(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"{self.file_name}:{line}: a key must be a name")
            elif key.value == MERGE_KEY and key.style is None:
                self.merge(value, line, above, merged)
            elif key.value in own:
                first = own[key.value].line
                self.problems.append(
                    f"{self.file_name}:{line}: '{key.value}' is given twice; first in line {first}"
                )
            else:
                own[key.value] = self.node(value, line, above)
        return own | {name: child for name, child in merged.items() if name not in own}

    def merge(self, node: yaml.Node, line: int, above: tuple[int, ...], merged: dict[str, Node]) -> None:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                self.problems.append(f"{self.file_name}:{line}: '<<' takes a mapping, or a list of them")
                continue
            for name, child in self.node(source, line, above).pairs.items():
                merged.setdefault(name, child)
