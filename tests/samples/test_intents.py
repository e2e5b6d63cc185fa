"""The sampled intents: split by template, the same bytes for the same seed, our Albanian, MASSIVE's shape."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest

from toolkit import durable, wheels
from toolkit.data.samples import intents, make, templates
from toolkit.data.samples.intents import SPLITS, Row
from toolkit.data.samples.locales import DEFAULT_LOCALES, HOME_ASSISTANT, LOCALES
from toolkit.errors import DataError, InputError, RunDirectoryError

# fmt: off
WANTED_IN_ALBANIAN = [
    "HassTurnOn", "HassTurnOff", "HassLightSet", "HassGetState", "HassGetWeather", "HassGetCurrentTime",
    "HassGetCurrentDate", "HassSetVolume", "HassMediaPause", "HassMediaUnpause", "HassMediaNext",
    "HassMediaPrevious", "HassVacuumStart", "HassVacuumReturnToBase", "HassClimateSetTemperature",
    "HassClimateGetTemperature", "HassStartTimer", "HassCancelTimer", "HassPauseTimer", "HassUnpauseTimer",
    "HassTimerStatus", "HassIncreaseTimer", "HassDecreaseTimer", "HassShoppingListAddItem", "HassListAddItem",
    "HassNevermind",
]
# fmt: on


@pytest.fixture(scope="module")
def sampled() -> dict[str, tuple[templates.Language, list[Row]]]:
    """A few languages: many templates, another script, English names, ours."""
    return {
        locale: (
            language := templates.load(locale),
            intents.sample(language, rows_per_intent=40, seed=3),
        )
        for locale in ("en-US", "fr-FR", "sq-AL", "th-TH", "tr-TR")
    }


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_template_lies_in_one_partition_only(sampled):
    for locale, (_, rows) in sampled.items():
        partitions = defaultdict(set)
        for row in rows:
            partitions[row.template].add(row.partition)
        assert {len(found) for found in partitions.values()} == {1}, locale


def test_an_intent_with_three_templates_is_in_every_partition(sampled):
    for locale, (language, rows) in sampled.items():
        found = defaultdict(set)
        for row in rows:
            found[row.intent].add(row.partition)
        for intent, members in language.templates.items():
            if len(members) >= 3:
                assert found[intent] == set(SPLITS), (locale, intent)


def test_no_utterance_appears_twice(sampled):
    for locale, (_, rows) in sampled.items():
        counts = Counter(" ".join(row.text.casefold().split()) for row in rows)
        assert counts.most_common(1)[0][1] == 1, locale


def test_partitions_have_about_their_share(sampled):
    _, rows = sampled["en-US"]
    counts = Counter(row.partition for row in rows)
    assert 0.75 < counts["train"] / len(rows) < 0.88
    assert min(counts["validation"], counts["test"]) > 0.06 * len(rows)


def test_utterances_are_plain_text(sampled):
    for locale, (_, rows) in sampled.items():
        for row in rows:
            assert row.text == " ".join(row.text.split()), locale
            assert not set("[]{}<>|") & set(row.text), (locale, row.text)


def test_slots_are_what_was_said(sampled):
    language, _ = sampled["en-US"]
    template = next(t for t in language.templates["HassSetVolume"] if "{name}" in t.text)
    utterance = language.walk(template, Random(5))
    assert utterance.slots["name"] in utterance.text
    assert str(utterance.slots["volume_level"]) in utterance.text


def test_names_fit_their_domain(sampled):
    language, _ = sampled["en-US"]
    media = set(language.home.names["media_player"])
    for seed in range(40):
        template = Random(seed).choice([t for t in language.templates["HassMediaNext"] if "{name}" in t.text])
        assert language.walk(template, Random(seed)).slots["name"] in media


def test_other_seeds_give_other_rows(sampled):
    language, rows = sampled["en-US"]
    assert intents.sample(language, rows_per_intent=40, seed=3) == rows
    assert intents.sample(language, rows_per_intent=40, seed=4) != rows


MAKE = """
import sys
from toolkit.data.samples import make
make("intents", sys.argv[1], locales=["en-US", "sq-AL"], rows_per_intent=20, seed=7)
make("conversations", sys.argv[2], rows_per_intent=5, seed=7)
assert "torch" not in sys.modules and "datasets" not in sys.modules
"""


def test_the_same_seed_gives_the_same_bytes_in_any_process(tmp_path):
    found = []
    for hash_seed in ("1", "2"):
        folders = [tmp_path / f"{name}-{hash_seed}" for name in ("intents", "conversations")]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", MAKE, *folders], env=environment, check=True, timeout=120)
        found.append([tree(folder) for folder in folders])
    assert found[0] == found[1]


def test_the_folder_has_the_shape_of_massive(tmp_path):
    folder = make("intents", tmp_path / "data", locales=["sq-AL", "sl-SL"], rows_per_intent=10)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "manifest.json", "sl-SL", "sq-AL"]
    durable.verify_folder(folder)
    for name in SPLITS:
        for row in rows_of(folder / "sq-AL" / f"{name}.jsonl"):
            assert list(row) == ["id", "locale", "partition", "scenario", "intent", "utt"]
            assert (row["locale"], row["partition"]) == ("sq-AL", name)
    card = (folder / "README.md").read_text()
    assert "sq-AL: the templates were written for meldkit" in card
    assert "English names in: sl-SL" in card
    assert "Apache-2.0" in card


def test_datasets_reads_the_folder_by_locale(tmp_path):
    import datasets

    folder = make("intents", tmp_path / "data", locales=["sq-AL"], rows_per_intent=10)
    loaded = datasets.load_dataset(str(folder), "sq-AL", cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == set(SPLITS)
    assert loaded["test"][0]["locale"] == "sq-AL"


def test_a_complete_folder_is_kept_and_another_is_left_alone(tmp_path):
    lines: list[str] = []
    folder = make("intents", tmp_path / "data", locales=["sq-AL"], rows_per_intent=4)
    before = (folder / "manifest.json").stat().st_mtime_ns
    make("intents", folder, locales=["sq-AL"], rows_per_intent=4, announce=lines.append)
    assert lines == [f"{folder} is complete already and is kept"]
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(RunDirectoryError, match="seed 0 instead of 1"):
        make("intents", folder, locales=["sq-AL"], rows_per_intent=4, seed=1)
    (folder / "sq-AL" / "test.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match=r"test\.jsonl is missing or was changed"):
        make("intents", folder, locales=["sq-AL"], rows_per_intent=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="did not write"):
        make("intents", tmp_path / "mine", locales=["sq-AL"])
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_unknown_names_come_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match="did you mean 'sq-AL'"):
        make("intents", tmp_path / "x", locales=["sq-AI"])
    with pytest.raises(InputError, match="did you mean 'intents'"):
        make("intent", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_every_language_of_home_assistant_has_a_locale():
    root = wheels.unpacked(templates.HOME_ASSISTANT_INTENTS)
    files = {path.stem for path in Path(root, "home_assistant_intents", "data").glob("*.json")}
    assert set(HOME_ASSISTANT.values()) == files


def test_every_home_has_all_names_and_the_default_locales_have_their_own():
    english = templates.homes()["en"]
    for home in templates.homes().values():
        assert (set(home.names), set(home.texts)) == (set(english.names), set(english.texts)), home.language
    for locale in set(DEFAULT_LOCALES) - {"sq-AL"}:
        assert templates.home_of(LOCALES[locale]).language == LOCALES[locale]


# --- Albanian


def test_albanian_has_the_intents_of_english(sampled):
    language, _ = sampled["sq-AL"]
    assert set(WANTED_IN_ALBANIAN) <= set(language.templates)
    assert set(language.templates) <= set(sampled["en-US"][0].templates)
    assert min(len(members) for members in language.templates.values()) >= 4


def test_every_albanian_template_walks_every_way(sampled):
    language, _ = sampled["sq-AL"]
    random = Random(0)
    for members in language.templates.values():
        for template in members:
            for _ in range(20):
                language.walk(template, random)


def test_albanian_nouns_stand_in_their_case(sampled):
    language, _ = sampled["sq-AL"]
    template = next(t for t in language.templates["HassTurnOn"] if "dritën e {area_gen:area}" in t.text)
    found = [language.walk(template, Random(seed)) for seed in range(60)]
    kitchen = [utterance.text for utterance in found if utterance.slots["area"] == "kuzhina"]
    assert kitchen
    assert all("dritën e kuzhinës" in text for text in kitchen)


def test_our_file_says_whose_it_is():
    path = Path(templates.__file__).parent / "sentences" / "sq.yaml"
    assert "Written by hand for meldkit" in path.read_text(encoding="utf-8")[:300]


# --- what hassil's own sampler cannot do


def language_of(sentences: list[str], **parts: object) -> templates.Language:
    from hassil.intents import Intents

    content = {"language": "xx", "intents": {"A": {"data": [{"sentences": sentences}]}}, **parts}
    parsed = Intents.from_dict(content)
    block = parsed.intents["A"].data[0]
    members = tuple(templates.Template("A", s.text or "", ((block, s),)) for s in block.sentences)
    home = templates.homes()["en"]
    return templates.Language("xx", "en", home, parsed.expansion_rules, parsed.slot_lists, {"A": members})


def test_a_huge_range_is_drawn_from_and_not_listed():
    lists = {"n": {"range": {"from": 0, "to": 10**12, "step": 7}}}
    language = language_of(["go to {n}"], lists=lists)
    value = language.walk(language.templates["A"][0], Random(0)).slots["n"]
    assert 0 <= value <= 10**12
    assert value % 7 == 0


def test_rules_that_refer_to_each_other_are_an_error():
    language = language_of(["say <a>"], expansion_rules={"a": "x <b>", "b": "y <a>"})
    with pytest.raises(DataError, match="refers to itself"):
        language.walk(language.templates["A"][0], Random(0))


def test_a_missing_rule_or_list_is_an_error_that_names_it():
    language = language_of(["say <nothing>"])
    with pytest.raises(DataError, match="<nothing>"):
        language.walk(language.templates["A"][0], Random(0))
    language = language_of(["say {nowhere}"])
    with pytest.raises(DataError, match=r"\{nowhere\}"):
        language.walk(language.templates["A"][0], Random(0))
