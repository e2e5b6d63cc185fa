"""Read the configuration of a recipe from a file and the command line: all problems at once, each with its
place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from toolkit.config.command_line import Arguments, Request, split_arguments
from toolkit.config.names import did_you_mean, nearest
from toolkit.config.options import Options
from toolkit.config.renamed import renamed
from toolkit.config.schema import Option, options_of
from toolkit.config.shipped import shipped_file
from toolkit.config.values import from_file, from_flags, plain_words, shown
from toolkit.config.yaml_file import Entry, read_file
from toolkit.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=Options)


@dataclass(frozen=True)
class Loaded(Generic[ConfigT]):
    """A configuration, where each of its values comes from, and what else was asked for.

    Attributes:
        provenance: by option: "flag --lora-r", "run.yaml:3" or "default".
        config_file: the file that was read, if any.
    """

    config: ConfigT
    provenance: dict[str, str]
    request: Request
    config_file: Path | None = None


@dataclass
class _Values:
    """What is collected before validation. ``places`` also has the names inside a mapping."""

    raw: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    additions: dict[str, dict[str, str]] = field(default_factory=dict)  # by option: word to its place
    settled: set[str] = field(
        default_factory=set
    )  # options with a problem already, or that a misspelt name meant

    def place(self, path: tuple[str, ...]) -> str:
        """Return "run.yaml:3: lora_r" or "--lora-r", for the start of a message."""
        name = path[0]
        place = self.places.get(path) or self.places.get(path[:1])
        dotted = ".".join(path)
        if place is None:
            return dotted
        if place.startswith("--"):
            return place if len(path) == 1 else f"{place} {path[-1]}"
        return f"{place}: {dotted if len(path) > 1 else name}"


def load(
    config_class: type[ConfigT], argv: list[str], *, default_file: Path | None = None
) -> Loaded[ConfigT]:
    """Read a recipe's configuration. A file comes first, flags win over it.

    Args:
        config_class: the recipe's model.
        argv: the arguments after the recipe's name.
        default_file: used when neither --config nor any required option but the output folder is given.

    Raises:
        ConfigError: with every problem that was found.
    """
    options = options_of(config_class)
    arguments = split_arguments(argv, options, config_class.synonyms)
    values = _Values(problems=list(arguments.problems), settled=set(arguments.misspelt))
    config_file, entries = _read(arguments, options, default_file, values)
    file_name = str(config_file) if arguments.request.config_file == str(config_file) else _short(config_file)
    for entry in entries:
        _take_entry(entry, f"{file_name}:{entry.line}", config_class, options, values)
    for name, given in arguments.values.items():
        _take_flag(options[name], given, arguments.flags[name], values)
    for name, flags in arguments.additions.items():
        values.additions.setdefault(name, {}).update({word: f"flag {flag}" for word, flag in flags.items()})
    for name, additions in values.additions.items():
        _add_to_list(options[name], additions, values)
    config = _validate(config_class, options, values)
    if config is None or values.problems:
        raise ConfigError(values.problems, hint=_hint(config_class, values, config_file))
    provenance = {name: values.provenance.get(name, "default") for name in options}
    return Loaded(config, provenance, arguments.request, config_file)


def load_for_command(config_class: type[ConfigT], argv: Sequence[str]) -> Loaded[ConfigT]:
    """Read the options of a command that trains nothing.

    Raises:
        ConfigError: all problems; also a flag that only training has, which would otherwise do nothing here.
    """
    loaded = load(config_class, list(argv))
    flags = {"--dry-run": loaded.request.dry_run, "--print-config": loaded.request.print_config}
    flags["--save-config"] = loaded.request.save_config is not None
    problems = [f"{flag} is a flag of meldkit train" for flag, is_given in flags.items() if is_given]
    if problems:
        raise ConfigError(problems)
    return loaded


def _read(
    arguments: Arguments, options: Mapping[str, Option], default_file: Path | None, values: _Values
) -> tuple[Path | None, list[Entry]]:
    config_file = _config_file(arguments, options, default_file)
    if config_file is None:
        return None, []
    try:
        entries, problems = read_file(config_file)
    except ConfigError as error:
        values.problems.extend(error.problems)
        values.settled.update(options)  # whatever is missing may stand in the file
        return config_file, []
    values.problems.extend(problems)
    return config_file, entries


def _short(path: Path | None) -> str:
    """A file that the user has not named, as briefly as it can be found."""
    try:
        return str(path.relative_to(Path.cwd())) if path else ""
    except ValueError:
        return path.name if path else ""


def _config_file(
    arguments: Arguments, options: Mapping[str, Option], default_file: Path | None
) -> Path | None:
    named = arguments.request.config_file
    if named is not None:
        # A recipe's name stands for the file that comes with it, unless there is a file of that name.
        is_name = "." not in named and "/" not in named and not Path(named).exists()
        return (shipped_file(named) if is_name else None) or Path(named)
    given = {name for name in arguments.values if options[name].is_required}
    if arguments.values.get("resume") == [True] and given == {"output_dir"}:
        saved = Path(str(arguments.values["output_dir"][0])) / "experiment_config.json"
        if saved.is_file():
            return saved
    return default_file if given <= {"output_dir"} else None


def _take_entry(
    entry: Entry,
    place: str,
    config_class: type[Options],
    options: Mapping[str, Option],
    values: _Values,
) -> None:
    synonym = config_class.synonyms.get(entry.name)
    if synonym is not None and synonym.adds:
        if entry.value is True:
            values.additions.setdefault(synonym.option, {})[synonym.adds] = place
        elif entry.value is not False:
            values.problems.append(f"{place}: {entry.name}: {shown(entry.value)} is not true or false")
        return
    option = options.get(synonym.option if synonym is not None else entry.name)
    if option is None:
        values.problems.append(
            f"{place}: unknown option '{entry.name}'{_instead(entry.name, options, values)}"
        )
        return
    try:
        values.raw[option.name] = from_file(option, entry.value, entry.text)
    except ValueError as error:
        values.problems.append(f"{place}: {option.name}: {error}")
        values.settled.add(option.name)
        return
    values.provenance[option.name] = place
    values.places[(option.name,)] = place
    for path, line in entry.lines.items():
        values.places[(option.name, *path)] = f"{place.rpartition(':')[0]}:{line}"


def _add_to_list(option: Option, additions: Mapping[str, str], values: _Values) -> None:
    """Put what switches add behind the list that is given, or behind the default."""
    given = values.raw.get(option.name, option.default)
    if option.name in values.settled or not isinstance(given, list):
        return
    values.raw[option.name] = [*given, *(word for word in additions if word not in given)]
    before = values.provenance.get(option.name, "default")
    values.provenance[option.name] = ", ".join([before, *additions.values()])


def _instead(name: str, options: Mapping[str, Option], values: _Values) -> str:
    hint = renamed(name, options)
    if hint is not None:
        values.settled.update(hint.options)
        return f"; {hint.sentence}"
    match = nearest(name, options)
    if match:
        values.settled.add(match)
    return did_you_mean(name, options)


def _take_flag(option: Option, given: list[str | bool], flag: str, values: _Values) -> None:
    try:
        value = from_flags(option, given)
    except ValueError as error:
        values.problems.append(f"{flag}: {error}")
        values.settled.add(option.name)
        return
    if option.kind == "mapping":
        # Single names of a mapping win over those of the file, which keeps its others.
        for name in value:
            values.places[(option.name, name)] = flag
        below = values.raw.get(option.name)
        if isinstance(below, dict) and below:
            value = {**below, **value}
            values.provenance[option.name] = f"{values.provenance[option.name]}, flag {flag}"
            values.raw[option.name] = value
            return
    values.raw[option.name] = value
    values.provenance[option.name] = f"flag {flag}"
    values.places[(option.name,)] = flag
    values.settled.discard(option.name)


def validated(config_class: type[ConfigT], given: Mapping[str, Any]) -> ConfigT:
    """A configuration of values that Python code gives.

    Raises:
        ConfigError: all that is wrong, unknown names with the nearest one.
    """
    options = options_of(config_class)
    values = _Values(raw={name: value for name, value in given.items() if name in options})
    values.problems += [
        f"unknown option '{name}'{did_you_mean(name, options)}" for name in given if name not in options
    ]
    config = _validate(config_class, options, values)
    if config is None or values.problems:
        raise ConfigError(values.problems)
    return config


def _validate(config_class: type[ConfigT], options: Mapping[str, Option], values: _Values) -> ConfigT | None:
    """Return the configuration, or None after its problems have been added to ``values``."""
    usable = {name: value for name, value in values.raw.items() if name not in values.settled}
    try:
        config = config_class.model_validate(usable)
    except ValidationError as error:
        failed = _add_field_problems(error, options, values)
    else:
        return config if not values.settled else None
    if failed:
        # Rules between the other options are checked all the same, so that the user hears of everything at
        # once.
        rest = {name: value for name, value in usable.items() if name not in failed}
        for name in failed:
            if options[name].is_required:
                rest[name] = options[name].placeholder
        try:
            config_class.model_validate(rest)
        except ValidationError as error:
            _add_conflicts(error, values, without=failed | values.settled)
    return None


def _add_field_problems(error: ValidationError, options: Mapping[str, Option], values: _Values) -> set[str]:
    """Add what is wrong with single options; return their names. Empty: the problems are between options."""
    failed: set[str] = set()
    seen: set[tuple[Any, ...]] = set()
    order = {name: position for position, name in enumerate(options)}
    details = error.errors(include_url=False)
    for detail in sorted(
        details, key=lambda detail: order.get(str(detail["loc"][0]), 0) if detail["loc"] else -1
    ):
        location = detail["loc"]
        if not location:
            _add_conflicts(error, values, without=values.settled)
            continue
        option = options[str(location[0])]
        failed.add(option.name)
        if detail["type"] == "missing" and len(location) == 1:
            if option.name not in values.settled:
                values.problems.append(
                    f"{option.name} is missing: {option.flag} {option.metavar} ({_first_words(option)})"
                )
            continue
        # A type with alternatives reports one error for each; the first is enough.
        key = (option.name,) if option.kind == "names" else location
        if key not in seen:
            seen.add(key)
            inner = tuple(str(part) for part in location[1:]) if option.kind == "mapping" else ()
            values.problems.append(f"{values.place((option.name, *inner))}: {plain_words(detail, option)}")
    return failed


def _add_conflicts(error: ValidationError, values: _Values, *, without: set[str]) -> None:
    for detail in error.errors(include_url=False):
        for conflict in detail.get("ctx", {}).get("conflicts", []):
            if without.isdisjoint(conflict.options):
                values.problems.append(f"{values.place(conflict.place)}: {conflict.message}")


def _first_words(option: Option) -> str:
    text = option.help.split(":")[0].split(". ")[0].rstrip(".")
    return text[0].lower() + text[1:] if text else option.name


def _hint(config_class: type[Options], values: _Values, config_file: Path | None) -> str | None:
    from toolkit.config.recipes import RECIPES

    recipe = next((name for name, known in RECIPES.items() if known is config_class), None)
    is_incomplete = any(" is missing: " in problem for problem in values.problems)
    if recipe is None or not is_incomplete or config_file is not None or shipped_file(recipe) is None:
        return None
    return f"--config {recipe} takes what is missing from the file that comes with the recipe"
