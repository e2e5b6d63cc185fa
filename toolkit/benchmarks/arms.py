"""Arms: the ways to train that are compared. Each is a YAML file; some come with meldkit, users add their own."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.config.names import did_you_mean
from toolkit.config.yaml_file import read_file
from toolkit.errors import ConfigError, InputError

FOLDER = Path(__file__).parent / "arms"
PROGRAMS = ("meldkit", "trl", "transformers")
"""Programs that come with meldkit (``toolkit/trials``); any other is the path of a script."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        name: the stem of the file.
        about: one line for people.
        program: ``meldkit``, ``trl``, ``transformers``, or the absolute path of a Python script that is started as
            ``python SCRIPT SPEC.json`` (docs/benchmarks.md has the contract).
        python: the interpreter, for libraries in an environment of their own.
        options: that differ from the workload's: options of ``meldkit train`` by name.
        left_at_defaults: options of the workload that a bare script does not set.
        environment: variables of the process.
        may_differ: gates that are not applied: ``loss`` for another loss function, ``tokens`` for other masks.
    """

    name: str
    about: str = ""
    program: str = "meldkit"
    python: str = field(default_factory=lambda: sys.executable)
    options: dict[str, Any] = field(default_factory=dict)
    left_at_defaults: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    may_differ: list[str] = field(default_factory=list)

    @property
    def backend(self) -> str:
        """What has to be in the trial's process: ``unsloth``, or ``hf`` for anything without it."""
        return str(self.options.get("backend", "hf"))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


GATES = ("loss", "tokens")
_TYPES: Mapping[str, tuple[type, str]] = {
    "about": (str, "text"),
    "program": (str, "text"),
    "python": (str, "text"),
    "options": (dict, "a mapping"),
    "left_at_defaults": (list, "a list"),
    "environment": (dict, "a mapping"),
    "may_differ": (list, "a list"),
}


def shipped_arms() -> dict[str, Path]:
    """The arms that come with meldkit: name → file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_arm(name: str) -> Arm:
    """An arm by the name of a shipped one or the path of a YAML file.

    Raises:
        InputError: there is no such arm, or no such program or interpreter.
        ConfigError: the file is not an arm.
    """
    shipped = shipped_arms()
    path = shipped.get(name) or Path(name).expanduser()
    if not path.is_file():
        if "/" in name or name.endswith((".yaml", ".yml")):
            raise InputError(f"--arms: there is no file {name}")
        raise InputError(
            f"--arms: unknown arm '{name}'{did_you_mean(name, shipped)}",
            hint="meldkit bench arms lists those that come with meldkit; a YAML file makes one of your own",
        )
    entries, problems = read_file(path)
    problems = list(problems)
    values: dict[str, Any] = {}
    for entry in entries:
        if entry.name not in _TYPES:
            problems.append(
                f"{path}:{entry.line}: unknown key '{entry.name}'{did_you_mean(entry.name, _TYPES)}"
            )
        elif not isinstance(entry.value, _TYPES[entry.name][0]):
            problems.append(f"{path}:{entry.line}: {entry.name} is {_TYPES[entry.name][1]}")
        else:
            values[entry.name] = entry.value
    for gate in values.get("may_differ", []):
        if gate not in GATES:
            problems.append(f"{path}: may_differ: '{gate}' is none of {', '.join(GATES)}")
    if problems:
        raise ConfigError(problems)
    values["environment"] = {key: str(value) for key, value in values.get("environment", {}).items()}
    return _resolved(Arm(name=path.stem, **values), path)


def load_arms(names: list[str]) -> list[Arm]:
    """The arms of a benchmark; names are unique.

    Raises:
        InputError, ConfigError: as :func:`load_arm`.
    """
    arms = [load_arm(name) for name in names]
    twice = {arm.name for arm in arms if sum(other.name == arm.name for other in arms) > 1}
    if twice:
        raise InputError(
            f"--arms names {', '.join(sorted(twice))} twice", hint="copy the file under another name"
        )
    return arms


def _resolved(arm: Arm, path: Path) -> Arm:
    """Scripts are found beside their YAML file."""
    program, python = arm.program, arm.python
    if program not in PROGRAMS:
        script = (path.parent / Path(program).expanduser()).resolve()
        if not script.is_file():
            raise InputError(
                f"{path}: program is one of {', '.join(PROGRAMS)} or a script, and there is no {script}"
            )
        program = str(script)
    if python != sys.executable and not Path(python).expanduser().is_file():
        raise InputError(f"{path}: there is no interpreter {python}")
    return replace(arm, program=program, python=str(Path(python).expanduser()))
