"""What the command line, the help and the files need to know about each option of a recipe."""

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from toolkit.config.options import Options

Kind = Literal["switch", "integer", "number", "text", "path", "choice", "list", "names", "mapping"]
METAVARS: dict[Kind, str] = {
    "integer": "N",
    "number": "X",
    "text": "TEXT",
    "path": "PATH",
    "list": "A,B",
    "names": "A,B",
    "mapping": "NAME=VALUE",
}


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        kind: switch (a bool), integer, number, text, path, choice, list, names (text or a list of names),
            mapping.
        choices: the values of a choice, or of each element of a list.
        is_optional: None is a value.
        splits_commas: a list may be given as ``a,b``.
        elements_are_text: the values of a list or mapping are text, and numbers in a file are taken as
            written.
        placeholder: a valid value, in the place of a required one that is wrong while rules between the others are
            checked.
    """

    name: str
    group: str
    help: str
    kind: Kind
    choices: tuple[str, ...]
    is_optional: bool
    is_required: bool
    default: Any
    splits_commas: bool
    elements_are_text: bool
    placeholder: Any = "?"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        return "|".join(self.choices) if self.kind == "choice" else METAVARS.get(self.kind, "")


def options_of(config_class: type[Options]) -> dict[str, Option]:
    """Return the options of a recipe by name, in the order of its option groups.

    An option that a recipe declares again, for another default or help text, stays in its group.
    """
    options: dict[str, Option] = {}
    groups = [group for group in config_class.__mro__ if issubclass(group, Options) and group is not Options]
    for place, group in enumerate(groups):
        title = (
            "Recipe"
            if group is config_class
            else (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")
        )
        for name in group.__annotations__:
            is_declared_below = any(name in below.__annotations__ for below in groups[place + 1 :])
            if name in config_class.model_fields and not is_declared_below:
                options[name] = _option(name, title, config_class.model_fields[name])
    return options


def _option(name: str, group: str, field: FieldInfo) -> Option:
    kind, choices, is_optional, elements_are_text = _analyse(field.annotation)
    is_required = field.is_required()
    default = None if is_required else field.get_default(call_default_factory=True)
    assert default is not PydanticUndefined
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return Option(
        name=name,
        group=group,
        help=" ".join((field.description or "").split()),
        kind=kind,
        choices=choices,
        is_optional=is_optional,
        is_required=is_required,
        default=default,
        splits_commas=bool(extra.get("splits_commas", True)),
        elements_are_text=elements_are_text,
        placeholder=extra.get("placeholder", "?"),
    )


def _analyse(annotation: Any) -> tuple[Kind, tuple[str, ...], bool, bool]:
    """Return kind, choices, whether None is allowed, and whether elements are text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _analyse(arguments[0])
    if origin in (Union, types.UnionType):
        members = [
            get_args(a)[0] if get_origin(a) is Annotated else a for a in arguments if a is not type(None)
        ]
        is_optional = len(members) < len(arguments)
        if len(members) == 1:
            kind, choices, _, elements_are_text = _analyse(members[0])
            return kind, choices, is_optional, elements_are_text
        if set(members) == {str, list[str]}:
            return "names", (), is_optional, True
    elif origin is Literal:
        return "choice", tuple(str(a) for a in arguments), False, False
    elif origin is list:
        kind, choices, _, _ = _analyse(arguments[0])
        return "list", choices, False, kind in ("text", "path", "choice")
    elif origin is dict:
        return "mapping", (), False, arguments[1] is str
    elif annotation in SIMPLE_KINDS:
        return SIMPLE_KINDS[annotation], (), False, False
    raise TypeError(f"an option cannot have the type {annotation}; extend toolkit/config/schema.py")


SIMPLE_KINDS: dict[Any, Kind] = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}
