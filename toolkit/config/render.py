"""Write a resolved configuration: as YAML that says where each value comes from, or as
experiment_config.json."""

import json
import re
from pathlib import Path
from typing import Any

from toolkit import durable
from toolkit.config.load import Loaded
from toolkit.config.schema import options_of
from toolkit.config.yaml_file import JSON_ONLY, scalar

# Text that needs no quotes: no character with a meaning in YAML, and nothing that reads as another type.
PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./@+-]*")


def as_yaml(loaded: Loaded[Any]) -> str:
    """Return the configuration as YAML, one ``name: value  # origin`` a line; --config reads it again."""
    values = loaded.config.model_dump(mode="json")
    options = options_of(type(loaded.config))
    settings = {name: f"{name}: {_yaml_value(values[name])}" for name in options}
    width = min(60, max(len(setting) for setting in settings.values()))
    lines: list[str] = []
    group = None
    for name, option in options.items():
        if option.group != group:
            lines += [*([""] if lines else []), f"# {option.group}"]
            group = option.group
        lines.append(f"{settings[name]:<{width}}  # {_one_line(loaded.provenance[name])}")
    return "\n".join(lines) + "\n"


def save(loaded: Loaded[Any], path: Path) -> None:
    """Write the configuration to ``path``: YAML by the ending .yaml or .yml, JSON otherwise."""
    if path.suffix in (".yaml", ".yml"):
        durable.write_text(path, as_yaml(loaded))
    else:
        durable.write_json(path, loaded.config.model_dump(mode="json"))


def _yaml_value(value: Any) -> str:
    if isinstance(value, str) and PLAIN_TEXT.fullmatch(value) and scalar(value) == value:
        return value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return JSON_ONLY.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
