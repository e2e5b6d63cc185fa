"""Read a configuration file, YAML or JSON, strictly, and remember the line of every key.

PyYAML scans and composes the file; what its nodes mean is decided here, by the core schema of YAML 1.2:
``1e-4`` is a number, ``no``, ``on`` and ``12:30`` are text, ``010`` is ten. Anchors, aliases, tags, duplicate
keys, deep nesting and large files are errors: a configuration needs none of them.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from toolkit.config.names import nearest
from toolkit.errors import ConfigError

MAX_NUM_BYTES = 1_000_000
MAX_DEPTH = 8

NULL = re.compile(r"null|Null|NULL|~|")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
INTEGER = re.compile(r"[-+]?[0-9]+")
OCTAL = re.compile(r"0o[0-7]+")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
NOT_A_NUMBER = re.compile(r"\.(nan|NaN|NAN)")
# Characters that JSON allows inside strings and YAML does not, or takes for a line break.
JSON_ONLY = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class Entry:
    """One key of the top level.

    Attributes:
        value: the value by the core schema of YAML 1.2: None, bool, int, float, str, list or dict.
        text: the same, but numbers as they were written, for options that are text (``gpu: 0``,
            ``revision: 1e5``).
        line: line of the key, from 1.
        lines: line of each key below this one, by its path (("neftune_noise_alpha",) -> 12).
    """

    name: str
    value: Any
    text: Any
    line: int
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)


class YamlProblem(Exception):
    """The file cannot be read any further: message and the line, from 1."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def read_file(path: str | Path) -> tuple[list[Entry], list[str]]:
    """Read a YAML or JSON file whose top level is a mapping.

    Returns:
        The keys in the order of the file, and the problems found (``run.yaml:3: ...``); the first of two
        equal keys is kept.

    Raises:
        ConfigError: the file is not there, cannot be read, or is not YAML: nothing in it can be used.
    """
    try:
        return parse(read_text(path), str(path))
    except YamlProblem as problem:
        place = f"{path}:{problem.line}" if problem.line else str(path)
        raise ConfigError([f"{place}: {problem}"]) from None


def read_text(path: str | Path) -> str:
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_NUM_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent
        siblings = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        match = nearest(path.name, siblings)
        raise YamlProblem("no such file" + (f"; did you mean '{folder / match}'?" if match else "")) from None
    except IsADirectoryError:
        raise YamlProblem("is a folder; name a YAML or JSON file in it") from None
    except OSError as error:
        raise YamlProblem(f"cannot be read ({error.strerror})") from None
    if len(content) > MAX_NUM_BYTES:
        raise YamlProblem(f"is larger than {MAX_NUM_BYTES:,} bytes; this is not a configuration file")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise YamlProblem("is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise YamlProblem("is not UTF-8; save it as UTF-8", line) from None


def parse(text: str, file_name: str) -> tuple[list[Entry], list[str]]:
    """Parse the text of a file. ``file_name`` is used in messages only. Raises :class:`YamlProblem`."""
    root = compose(text)
    problems: list[str] = []
    entries: list[Entry] = []
    for name, node, line in _pairs(root, file_name, (), problems):
        lines: dict[tuple[str, ...], int] = {}
        value, as_text = _value(node, file_name, (name,), problems, lines)
        entries.append(Entry(name, value, as_text, line, lines))
    return entries, problems


def compose(text: str, *, max_depth: int = MAX_DEPTH, aliases: bool = False) -> yaml.MappingNode:
    """Return the nodes of a file whose top level is a mapping; tags are never followed.

    Args:
        text: YAML or JSON.
        max_depth: levels of nesting.
        aliases: allow anchors and aliases; an alias is then the same node object as its anchor, perhaps inside it.

    Raises:
        YamlProblem: with the line.
    """
    text = _json_as_yaml(text)
    try:
        _refuse_what_no_configuration_needs(text, max_depth, aliases)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise YamlProblem(*_plain_words(error, text)) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise YamlProblem(f"the character U+{code:04X} is not allowed", line) from None
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.value.strip() and root.style is None):
        raise YamlProblem("the file is empty; write NAME: VALUE lines")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "text"
        raise YamlProblem(f"holds {kind}; NAME: VALUE lines are expected", root.start_mark.line + 1)
    return root


def scalar(text: str) -> Any:
    """Return what an unquoted scalar means by the core schema of YAML 1.2."""
    if NULL.fullmatch(text):
        return None
    if TRUE.fullmatch(text):
        return True
    if FALSE.fullmatch(text):
        return False
    if INTEGER.fullmatch(text) and len(text) <= 4000:  # Python converts no longer ones
        return int(text)
    if OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    if FLOAT.fullmatch(text):
        return float(text)
    if INFINITY.fullmatch(text):
        return float("-inf") if text[0] == "-" else float("inf")
    if NOT_A_NUMBER.fullmatch(text):
        return float("nan")
    return text


def inline_value(text: str) -> Any:
    """Return the value of one line of YAML, as given on the command line: ``5``, ``true``, ``{"a": 1}``.

    Raises:
        YamlProblem: it is not one value.
    """
    entries, problems = parse(f"value: {text}", "value")
    if problems or len(entries) != 1:
        raise YamlProblem(problems[0] if problems else "is not one value")
    return entries[0].value


def _json_as_yaml(text: str) -> str:
    """JSON is YAML but for tabs between tokens and a few characters in strings; both are put right here."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return JSON_ONLY.sub(lambda match: f"\\u{ord(match[0]):04x}", text.replace("\t", " "))


def _refuse_what_no_configuration_needs(text: str, max_depth: int, aliases: bool) -> None:
    """Look at the stream of events, which is flat, before anything nested is built from it."""
    depth = num_documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if not aliases:
                raise YamlProblem(f"'*{event.anchor}': aliases are not allowed; write the value out", line)
            continue
        if getattr(event, "anchor", None) and not aliases:
            raise YamlProblem(f"'&{event.anchor}': anchors are not allowed; write the value out", line)
        if getattr(event, "tag", None):
            raise YamlProblem(f"'{event.tag}': tags are not allowed", line)
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                raise YamlProblem("a second document starts here; one file holds one configuration", line)
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
            if depth > max_depth:
                raise YamlProblem(f"nested more than {max_depth} levels deep", line)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1


def _pairs(
    node: yaml.MappingNode, file_name: str, above: tuple[str, ...], problems: list[str]
) -> Iterator[tuple[str, yaml.Node, int]]:
    """Yield name, node and line of the keys of a mapping; a repeated key is a problem and is left out."""
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{file_name}:{line}: a key must be a name")
            continue
        name = key.value
        if name in first_lines:
            full = ".".join((*above, name))
            problems.append(f"{file_name}:{line}: '{full}' is given twice; first in line {first_lines[name]}")
            continue
        first_lines[name] = line
        yield name, value, line


def _value(
    node: yaml.Node,
    file_name: str,
    path: tuple[str, ...],
    problems: list[str],
    lines: dict[tuple[str, ...], int],
) -> tuple[Any, Any]:
    """Return the value of a node, and the value with its numbers as they were written."""
    if isinstance(node, yaml.ScalarNode):
        if node.style is not None:
            text = joined_surrogates(node.value, node.start_mark.line + 1)
            return text, text
        value = scalar(node.value)
        return value, node.value if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(node, yaml.SequenceNode):
        pairs = [_value(child, file_name, path, problems, lines) for child in node.value]
        return [value for value, _ in pairs], [text for _, text in pairs]
    assert isinstance(node, yaml.MappingNode)
    values: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for name, child, line in _pairs(node, file_name, path, problems):
        lines[(*path[1:], name)] = line
        values[name], texts[name] = _value(child, file_name, (*path, name), problems, lines)
    return values, texts


def joined_surrogates(text: str, line: int) -> str:
    """JSON escapes a character beyond U+FFFF as two halves, which PyYAML leaves apart."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise YamlProblem("half of a character (a lone surrogate)", line) from None


def _plain_words(error: yaml.MarkedYAMLError, text: str) -> tuple[str, int | None]:
    """Return what a syntax error of PyYAML means to the user, and its line."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    problem = error.problem or "is not YAML"
    source = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "'\\t'" in problem or source.startswith("\t"):
        return "a tab; YAML is indented with spaces", line
    if "mapping values are not allowed" in problem:
        return "a second ': ' in one line; put the value in quotes", line
    if "could not find expected ':'" in problem:
        return (
            "no ': ' between the name and the value",
            error.context_mark.line + 1 if error.context_mark else line,
        )
    if "expected <block end>" in problem:
        return "the indentation differs from the lines above", line
    if "found unexpected end of stream" in problem or "expected ',' or" in problem:
        start = f" that opens in line {error.context_mark.line + 1}" if error.context_mark else ""
        return f"the quote or bracket{start} is not closed", line
    return f"is not YAML: {problem}", line
