"""The rows of every locale of a run: to train, to validate while training, and to compare in the end."""

from dataclasses import dataclass
from typing import Any

from toolkit.data.prepare import Prepared, prepare, shared_label_names
from toolkit.data.read import EVALUATION_SPLITS, open_source
from toolkit.rounds.team import Team

TEST_SPLIT = "test"


@dataclass(frozen=True)
class LocaleRows:
    """Rows of every locale that trains, and of target languages that do not.

    Attributes:
        rows: prepared rows by locale.
        compared: rows on which the models of each locale are compared: its test split, else its held-out rows.
        label_names: the classes of the one classifier; None for a language model.
    """

    rows: dict[str, Prepared]
    compared: dict[str, Any]
    label_names: list[str] | None


def prepare_locales(config: Any, tokenizer: Any, team: Team) -> LocaleRows:
    """Read, check and tokenise. On all ranks.

    Raises:
        DataError: wrong data, or a locale without rows.
    """
    targets = config.targets if config.merge_scope == "target" else ()
    own = {locale: config.for_locale(locale) for locale in dict.fromkeys([*config.locales, *targets])}
    label_names = None
    if config.task == "sequence-classification":
        label_names = shared_label_names([own[locale] for locale in config.locales])
    found = LocaleRows({}, {}, label_names)
    for is_turn in (team.is_main, not team.is_main):  # the others read what the first has put into the cache
        for locale, options in own.items() if is_turn else ():
            _prepare(found, locale, options, tokenizer, config)
        team.wait()
    return found


def _prepare(found: LocaleRows, locale: str, options: Any, tokenizer: Any, config: Any) -> None:
    keywords = {"seed": config.seed, "label_names": found.label_names}
    rows = compared = prepare(options, tokenizer, config.task, **keywords)
    if (test := _with_test_split(options)) is not None:
        compared = prepare(test, tokenizer, config.task, **keywords)
    found.rows[locale] = rows
    if compared.evaluation is not None:
        found.compared[locale] = compared.evaluation


def _with_test_split(options: Any) -> Any | None:
    """The options that read the test split as held-out rows, where there is one besides those that training looks at:
    a gate and a schedule choose by those, so they would flatter the result."""
    if options.eval_data is not None or options.eval_split == TEST_SPLIT:
        return None
    splits = open_source(options.data).splits
    if TEST_SPLIT not in splits or not any(
        name in splits for name in EVALUATION_SPLITS if name != TEST_SPLIT
    ):
        return None
    return options.model_copy(update={"eval_split": TEST_SPLIT})
