"""Split the arguments of a recipe into options. What the values mean is decided in values.py.

``--max-epochs 3``, ``--max_epochs 3`` and ``--max-epochs=3`` are the same. A switch is ``--packing``,
``--no-packing`` or ``--packing true``. A list is ``a,b`` or the flag repeated; a mapping is ``k=v,k2=v2`` or
the flag repeated. A value that begins with a dash and is no number is given as ``--name=-value``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from toolkit.config.names import did_you_mean, nearest, plain
from toolkit.config.options import Synonym
from toolkit.config.renamed import renamed
from toolkit.config.schema import Option

NUMBER = re.compile(r"-(\d|\.\d|\.inf).*", re.IGNORECASE)
SWITCH_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True)
class Request:
    """What is asked for besides the options of the recipe.

    Attributes:
        config_file: the value of --config, or None.
        save_config: the path of --save-config; "" when it is given without a path; None without it.
    """

    config_file: str | None = None
    help: bool = False
    dry_run: bool = False
    print_config: bool = False
    save_config: str | None = None
    debug: bool = False


REQUEST_HELP = {
    "--config FILE": "Read options from a YAML or JSON file; flags win over it. Also --config-file. "
    "The name of a recipe stands for the file that comes with it.",
    "--dry-run": "Print the resolved configuration, the launch plan and the command, and start nothing.",
    "--print-config": "Print the resolved configuration as YAML, with the origin of each value, and stop.",
    "--save-config [FILE]": "Write the resolved configuration; without FILE: experiment_config.json in "
    "--output-dir.",
    "--debug": "Show the traceback of an error.",
    "-h, --help": "Show this help and stop.",
}
REQUEST_SWITCHES = {"help", "dry_run", "print_config", "debug"}
REQUEST_NAMES = REQUEST_SWITCHES | {"config", "config_file", "save_config"}


@dataclass
class Arguments:
    """The arguments, split.

    Attributes:
        values: text of each value, by option; a list or mapping may have several. A switch has one bool.
        flags: the flag as it was typed, by option.
        additions: what switches add to lists, by option: the word and the flag.
        misspelt: the options that unknown flags probably meant.
    """

    request: Request
    values: dict[str, list[str | bool]] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    additions: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    misspelt: set[str] = field(default_factory=set)


def split_arguments(
    argv: list[str], options: Mapping[str, Option], synonyms: Mapping[str, Synonym] | None = None
) -> Arguments:
    """Split ``argv`` by the options of a recipe, which may have further names. Problems are collected, never raised."""
    return _Splitter(argv, options, synonyms or {}).split()


class _Splitter:
    def __init__(
        self, argv: list[str], options: Mapping[str, Option], synonyms: Mapping[str, Synonym]
    ) -> None:
        self.rest = list(reversed(argv))
        self.options = options
        self.synonyms = synonyms
        self.out = Arguments(Request())
        self.request: dict[str, str | bool] = {}

    def split(self) -> Arguments:
        while self.rest:
            word = self.rest.pop()
            if word == "-h":
                self.request["help"] = True
            elif word.startswith("--") and len(word) > 2:
                flag, equals, value = word.partition("=")
                self._flag(flag, value if equals else None)
            else:
                self._stray(word)
        config_file = self.request.pop("config", None)
        self.out.request = Request(config_file=config_file, **self.request)  # type: ignore[arg-type]  # the keys are those of Request
        return self.out

    def _flag(self, flag: str, value: str | None) -> None:
        name = flag[2:].replace("-", "_")
        switch = self.synonyms.get(name.removeprefix("no_"))
        if switch is not None and switch.adds:
            self._adding_switch(flag, switch, value)
            return
        option = self.options.get(self.synonyms[name].option if name in self.synonyms else name)
        if option is None and name in REQUEST_NAMES:
            self._request_flag(flag, name, value)
            return
        if option is None and name.startswith("no_"):
            option = self.options.get(name[3:])
            if option is not None and option.kind == "switch":
                if value is not None:
                    self.out.problems.append(f"{flag}={value}: takes no value; write {flag} or {option.flag}")
                self._add(option, flag, False)
                return
            option = None
        if option is None:
            self._unknown(flag, name, value)
        elif option.kind == "switch":
            self._add(option, flag, self._switch_value(flag, value))
        else:
            value = value if value is not None else self._next_value()
            if value is None:
                self.out.problems.append(f"{flag}: no value is given; {flag} {option.metavar}")
                self.out.misspelt.add(option.name)
            else:
                self._add(option, flag, value)

    def _add(self, option: Option, flag: str, value: str | bool) -> None:
        if option.name in self.out.values and option.kind not in ("list", "names", "mapping"):
            self.out.problems.append(f"{flag}: is given twice; first as {self.out.flags[option.name]}")
            return
        self.out.values.setdefault(option.name, []).append(value)
        self.out.flags.setdefault(option.name, flag)

    def _adding_switch(self, flag: str, synonym: Synonym, value: str | None) -> None:
        """--enable-wandb, --no-enable-wandb, --enable-wandb true."""
        is_on = self._switch_value(flag, value)
        if isinstance(is_on, str):
            self.out.problems.append(f"{flag}: '{is_on}' is not true or false")
        elif is_on and not flag.startswith("--no-"):
            self.out.additions.setdefault(synonym.option, {})[synonym.adds] = flag

    def _switch_value(self, flag: str, value: str | None) -> str | bool:
        if value is None:
            if not self.rest or self.rest[-1].lower() not in SWITCH_WORDS:
                return True
            value = self.rest.pop()
        return SWITCH_WORDS.get(value.lower(), value)

    def _next_value(self) -> str | None:
        """Take the next word unless it is a flag."""
        if not self.rest:
            return None
        word = self.rest[-1]
        if word.startswith("-") and len(word) > 1 and not NUMBER.fullmatch(word):
            return None
        return self.rest.pop()

    def _request_flag(self, flag: str, name: str, value: str | None) -> None:
        name = "config" if name == "config_file" else name
        if name in self.request and name not in ("help", "debug"):
            self.out.problems.append(f"{flag}: is given twice")
            self._next_value() if name == "config" and value is None else None
            return
        if name == "config":
            value = value if value is not None else self._next_value()
            if not value:
                self.out.problems.append(f"{flag}: no value is given; {flag} FILE")
                return
            self.request["config"] = value
        elif name == "save_config":
            self.request["save_config"] = value if value is not None else (self._next_value() or "")
        else:
            switch = self._switch_value(flag, value)
            if isinstance(switch, str):
                self.out.problems.append(f"{flag}={switch}: takes no value")
            self.request[name] = bool(switch)

    def _unknown(self, flag: str, name: str, value: str | None) -> None:
        if value is None:
            self._next_value()  # it belongs to the unknown flag
        hint = renamed(name, self.options)
        if hint is not None:
            sentence = hint.sentence
            for option in hint.options:
                sentence = sentence.replace(f"'{option}'", f"'{self.options[option].flag}'")
            self.out.problems.append(f"{flag}: unknown option; {sentence}")
            self.out.misspelt.update(hint.options)
            return
        valid = {o.flag[2:] for o in self.options.values()} | {n.replace("_", "-") for n in REQUEST_NAMES}
        valid |= {name.replace("_", "-") for name in self.synonyms}
        valid |= {f"no-{o.flag[2:]}" for o in self.options.values() if o.kind == "switch"}
        self.out.problems.append(f"{flag}: unknown option{did_you_mean(name, valid, prefix='--')}")
        match = nearest(name, valid)
        if match:
            self.out.misspelt.add(plain(match))

    def _stray(self, word: str) -> None:
        flag = "--" + plain(word.split("=")[0]).replace("_", "-")
        if flag[2:].replace("-", "_") in self.options:
            hint = f"; did you mean '{flag}'?"
        elif self.out.flags:
            last = self.options[list(self.out.flags)[-1]]
            hint = (
                f"; several values of {last.flag} are written {last.flag} a,b"
                if last.kind in ("list", "names")
                else ""
            )
        else:
            hint = ""
        self.out.problems.append(f"'{word}': an option begins with --{hint}")
