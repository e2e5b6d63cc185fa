"""Sentence templates of a language, and a seeded random walk through them.

The templates are written in the language of hassil: ``[turn] (on|off) <the> {name}``. hassil's own sampler
lists all sentences of a template in order, which never ends for most of them; a walk takes one choice at
every fork.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import yaml
from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    Permutation,
    RuleReference,
    Sentence,
    TextChunk,
)
from hassil.intents import (
    Intent,
    IntentData,
    Intents,
    RangeFractionType,
    RangeSlotList,
    SlotList,
    TextSlotList,
)
from hassil.util import normalize_whitespace

from toolkit import wheels
from toolkit.data.samples.locales import DECIMAL_POINT, HOME_ASSISTANT, LOCALES, OURS
from toolkit.errors import DataError
from toolkit.wheels import Announce, Wheel, silent

HOME_ASSISTANT_INTENTS = Wheel(
    package="home-assistant-intents",
    version="2026.10.27",
    sha256="256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
    num_bytes=775_094,
    licence="Apache-2.0",
    members=("home_assistant_intents/data/*.json",),
)
OWN_TEMPLATES = "sentences"
NAME_DOMAINS = {"input_boolean": "switch", "input_button": "button"}
MAX_DEPTH = 32
FRACTION_SHARE = 0.2
"""Share of the numbers with a fraction, where a range allows fractions."""


@dataclass(frozen=True)
class Home:
    """What users name themselves: rooms, floors, devices by domain, free texts by list."""

    language: str
    areas: tuple[str, ...]
    floors: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Utterance:
    """One sampled sentence and the slots that its walk filled (as in Home Assistant's intents)."""

    text: str
    slots: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Template:
    """One sentence template of an intent. Blocks that repeat the same text belong to the same template."""

    intent: str
    text: str
    sources: tuple[tuple[IntentData, Sentence], ...]


@dataclass(frozen=True, eq=False)
class Language:
    """The templates of one locale by intent, and everything that a walk needs."""

    locale: str
    code: str
    home: Home
    rules: Mapping[str, Sentence]
    lists: Mapping[str, SlotList]
    templates: Mapping[str, tuple[Template, ...]]

    def walk(self, template: Template, random: Random) -> Utterance:
        """Return a random sentence of ``template``.

        Raises:
            DataError: the template refers to a rule or list that does not exist, or to itself.
        """
        block, sentence = random.choice(template.sources)
        step = _Walk(self, block, random)
        text = normalize_whitespace(step.text(sentence.expression)).strip()
        return Utterance(text, {**block.slots, **step.slots})


@dataclass
class _Walk:
    """One walk: collects the slots on its way."""

    language: Language
    block: IntentData
    random: Random
    slots: dict[str, Any] = field(default_factory=dict)
    depth: int = 0

    def text(self, expression: Expression) -> str:
        if isinstance(expression, TextChunk):
            return expression.original_text
        if isinstance(expression, Alternative):
            return self.text(self.random.choice(expression.items))
        if isinstance(expression, Permutation):
            items = self.random.sample(expression.items, len(expression.items))
            return " ".join(self.text(item).strip() for item in items)
        if isinstance(expression, Group):
            return "".join([self.text(item) for item in expression.items])
        if isinstance(expression, RuleReference):
            return self._rule(expression.rule_name)
        if isinstance(expression, ListReference):
            return self._list(expression)
        raise DataError(
            f"{self.language.locale}: a template holds {type(expression).__name__}, which hassil is new to"
        )

    def _rule(self, name: str) -> str:
        rule = self.block.expansion_rules.get(name) or self.language.rules.get(name)
        if rule is None:
            raise DataError(f"{self.language.locale}: there is no expansion rule <{name}>")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise DataError(f"{self.language.locale}: the expansion rule <{name}> refers to itself")
        text = self.text(rule.expression)
        self.depth -= 1
        return text

    def _list(self, reference: ListReference) -> str:
        text, value = self._value(reference.list_name)
        self.slots[reference.slot_name] = value
        return text

    def _value(self, name: str) -> tuple[str, Any]:
        """Return the text and the value of a random entry of the list ``name``."""
        values = self.block.slot_lists.get(name) or self.language.lists.get(name)
        if isinstance(values, TextSlotList) and values.values:
            entry = self.random.choice(values.values)
            text = self.text(entry.text_in).strip()
            # A template as value means what was said.
            return text, text if entry.value_out is None else entry.value_out
        if isinstance(values, RangeSlotList):
            return self._number(values)
        home = self.language.home
        if name == "area":
            choices = home.areas
        elif name == "floor":
            choices = home.floors
        elif name == "name":
            domains = sorted({NAME_DOMAINS.get(domain, domain) for domain in self.block.domains})
            choices = [named for domain in domains for named in home.names.get(domain, ())]
        else:
            choices = home.texts.get(name, ())
        if not choices:
            raise DataError(f"{self.language.locale}: there is nothing to put for {{{name}}}")
        text = self.random.choice(choices)
        return text, text

    def _number(self, values: RangeSlotList) -> tuple[str, float]:
        """Draw one number of a range: the range is never listed."""
        number: float = self.random.randrange(values.start, values.stop + 1, values.step)
        if values.fraction_type is not None and self.random.random() < FRACTION_SHARE:
            number += self.random.choice(RangeFractionType.get_fractions(values.fraction_type))
        text = f"{number:g}"
        if self.language.code not in DECIMAL_POINT:
            text = text.replace(".", ",")
        value = number if values.multiplier is None else number * values.multiplier
        return text, int(value) if value == int(value) else value


@cache
def homes() -> dict[str, Home]:
    """Return the names of rooms and devices by language code."""
    path = resources.files("toolkit.data.samples") / "homes.yaml"
    found = {}
    for language, parts in yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader).items():
        names = {domain: tuple(map(str, values)) for domain, values in parts["names"].items()}
        texts = {name: tuple(map(str, values)) for name, values in parts["texts"].items()}
        found[language] = Home(language, tuple(parts["area"]), tuple(parts["floor"]), names, texts)
    return found


def home_of(code: str) -> Home:
    """Return the names for a language: its own, those of its parent (pt for pt-XX), else the English ones."""
    known = homes()
    return known.get(code) or known.get(code.split("-")[0]) or known["en"]


def load(locale: str, *, announce: Announce = silent) -> Language:
    """Read the templates of ``locale``.

    Raises:
        MeldkitError: the package with the templates cannot be fetched.
    """
    code = LOCALES[locale]
    content = _own(OURS[locale]) if locale in OURS else _home_assistant(HOME_ASSISTANT[locale], announce)
    parsed = Intents.from_dict(content)
    templates = {}
    # A text that two intents have says nothing about the intent: the one with fewer templates keeps it.
    owners: dict[str, str] = {}
    for name, intent in sorted(parsed.intents.items(), key=_num_sentences):
        by_text: dict[str, list[tuple[IntentData, Sentence]]] = {}
        for block in intent.data:
            for sentence in block.sentences:
                text = normalize_whitespace(sentence.text or "").strip()
                if owners.setdefault(text, name) == name:
                    by_text.setdefault(text, []).append((block, sentence))
        templates[name] = tuple(Template(name, text, tuple(by_text[text])) for text in sorted(by_text))
    return Language(locale, code, home_of(code), parsed.expansion_rules, parsed.slot_lists, templates)


def _num_sentences(item: tuple[str, Intent]) -> tuple[int, str]:
    name, intent = item
    return sum(len(block.sentence_texts) for block in intent.data), name


def _home_assistant(code: str, announce: Announce) -> dict[str, Any]:
    folder = wheels.unpacked(HOME_ASSISTANT_INTENTS, announce=announce)
    path = Path(folder, "home_assistant_intents", "data", f"{code}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _own(code: str) -> dict[str, Any]:
    path = resources.files("toolkit.data.samples") / OWN_TEMPLATES / f"{code}.yaml"
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def source_name(locale: str) -> str:
    """Return where the templates of ``locale`` come from: a package, or this one."""
    return "meldkit" if locale in OURS else HOME_ASSISTANT_INTENTS.package
