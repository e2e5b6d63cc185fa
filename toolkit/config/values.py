"""From the raw value of a file or a flag to what an option takes, and from pydantic's errors to plain
words."""

import json
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from toolkit.config.names import did_you_mean
from toolkit.config.schema import Option
from toolkit.config.yaml_file import YamlProblem, inline_value

NONE_WORDS = {"none", "null"}
EXPECTED = {
    "switch": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "text": "text",
    "path": "a path",
    "list": "a list",
    "names": "a list of names",
    "mapping": "a mapping",
}


def shown(value: Any) -> str:
    """Return a value as it is quoted in a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"'{value}'" if isinstance(value, str | Path) else str(value)
    return text if len(text) <= 80 else text[:76] + " ..."


def from_file(option: Option, value: Any, text: Any) -> Any:
    """Return the value that pydantic gets, for a value of a file.

    Args:
        value: by the schema of YAML.
        text: the same with numbers as they were written, for options that are text.

    Raises:
        ValueError: the value cannot be meant; the message completes ``lora_r: ...``.
    """
    if value is None or (isinstance(value, str) and option.is_optional and value.lower() in NONE_WORDS):
        if option.is_optional:
            return None
        raise ValueError("has no value")
    if isinstance(value, dict) and option.kind != "mapping":
        raise ValueError(f"is a mapping; {_expected(option)} is expected")
    if isinstance(value, list) and option.kind not in ("list", "names"):
        raise ValueError(f"is a list; {_expected(option)} is expected")
    if isinstance(value, bool) and option.kind not in ("switch", "choice"):
        in_quotes = " (for text, put it in quotes)" if option.kind in ("text", "path") else ""
        raise ValueError(f"{shown(value)} is not {_expected(option)}{in_quotes}")
    if option.kind in ("text", "path", "choice", "names"):
        return text
    if option.kind in ("list", "mapping"):
        if isinstance(value, str):
            return from_flags(option, [value])
        if isinstance(value, list | dict):
            return text if option.elements_are_text else value
        return [text if option.elements_are_text else value] if option.kind == "list" else value
    return value


def from_flags(option: Option, given: list[str | bool]) -> Any:
    """Return the value that pydantic gets, for the values of a flag. Raises ValueError as
    :func:`from_file`."""
    if option.kind == "mapping":
        merged: dict[str, Any] = {}
        for text in given:
            for name, value in _mapping(str(text), option.elements_are_text).items():
                if name in merged:
                    raise ValueError(f"'{name}' is given twice")
                merged[name] = value
        return merged
    if option.kind == "list":
        return [element for text in given for element in _elements(str(text), option)]
    if option.kind == "names":
        return str(given[0]) if len(given) == 1 else [e for text in given for e in str(text).split(",")]
    value = given[0]
    if isinstance(value, str) and option.is_optional and value.lower() in NONE_WORDS:
        return None
    return value


def _expected(option: Option) -> str:
    return f"one of {', '.join(option.choices)}" if option.kind == "choice" else EXPECTED[option.kind]


def _elements(text: str, option: Option) -> list[Any]:
    """``a,b``; or a JSON list; or nothing: the empty list."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError(f"{shown(text)} is not a JSON list") from None
    if not text.strip() or text.strip().lower() in NONE_WORDS:
        return []
    return [part.strip() for part in text.split(",")] if option.splits_commas else [text]


def _mapping(text: str, values_are_text: bool) -> dict[str, Any]:
    """``k=v,k2=v2``; or a JSON object. Commas inside brackets or quotes do not separate."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError(f"{shown(text)} is not a JSON object") from None
    mapping: dict[str, Any] = {}
    for part in _split_outside_brackets(text):
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError(f"{shown(part)} is not NAME=VALUE")
        if name in mapping:
            raise ValueError(f"'{name}' is given twice")
        try:
            mapping[name] = value.strip() if values_are_text else inline_value(value)
        except YamlProblem as problem:
            raise ValueError(f"{shown(part)}: {problem}") from None
    return mapping


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        if character == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def plain_words(error: ErrorDetails, option: Option) -> str:
    """Return what an error of pydantic means: "'fast' is not a number"."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind.startswith(("int_", "float_", "bool_", "string_", "path_", "list_", "dict_")):
        of_kind = {"int": "integer", "float": "number", "bool": "switch", "string": "text", "dict": "mapping"}
        prefix = kind.split("_")[0]
        return f"{shown(value)} is not {EXPECTED[of_kind.get(prefix, prefix)]}"
    if kind == "literal_error":
        choices = option.choices
        suggestion = did_you_mean(str(value), choices) if isinstance(value, str) else ""
        return f"{shown(value)} is not one of {', '.join(choices)}{suggestion}"
    if kind in BOUNDS:
        words, key = BOUNDS[kind]
        return f"{shown(value)} is out of range; it must be {words} {context[key]:g}"
    if kind == "finite_number":
        return f"{shown(value)} is not a finite number"
    if kind == "value_error":
        return str(context["error"])
    return error["msg"][0].lower() + error["msg"][1:]


BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
