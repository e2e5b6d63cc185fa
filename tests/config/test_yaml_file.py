import json

import pytest

from toolkit.config.yaml_file import MAX_NUM_BYTES, YamlProblem, parse, read_file
from toolkit.errors import ConfigError


def values(text: str) -> dict:
    entries, problems = parse(text, "run.yaml")
    assert problems == []
    return {entry.name: entry.value for entry in entries}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-2", -2),
        ("+7", 7),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2026-11-22", "2026-11-22"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("~", None),
        ("", None),
        ("NULL", None),
        ('"1e-4"', "1e-4"),
        ("'null'", "null"),
        ("[1, a, {b: 2.5}]", [1, "a", {"b": 2.5}]),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    result = values(f"name: {text}")["name"]
    assert result == value
    assert type(result) is type(value)


def test_numbers_keep_their_text_for_options_that_are_text():
    entries, _ = parse('a: 1e5\nb: "7"\nc: [0, x, 010]\nd: {e: 1.50}\nf: true', "run.yaml")
    assert [entry.text for entry in entries] == ["1e5", "7", ["0", "x", "010"], {"e": "1.50"}, True]


def test_every_key_has_its_line():
    entries, _ = parse("# comment\na: 1\n\nb:\n  c: 2\n  d:\n    e: 3\n", "run.yaml")
    assert [(entry.name, entry.line) for entry in entries] == [("a", 2), ("b", 4)]
    assert entries[1].lines == {("c",): 5, ("d",): 6, ("d", "e"): 7}


def test_duplicate_keys_are_problems_at_every_level():
    _, problems = parse("a: 1\nb: {c: 1, d: 2, c: 3}\na: 2\n", "run.yaml")
    assert problems == [
        "run.yaml:2: 'b.c' is given twice; first in line 2",
        "run.yaml:3: 'a' is given twice; first in line 1",
    ]


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "empty", None),
        ("# only a comment\n", "empty", None),
        ("- a\n- b\n", "a list", 1),
        ("just words\n", "text", 1),
        ("a: 1\nb: &x 2\n", "anchors are not allowed", 2),
        ("a: *x\n", "aliases are not allowed", 1),
        ("a: !!python/object/apply:os.system [ls]\n", "tags are not allowed", 1),
        ("a: !!str 3\n", "tags are not allowed", 1),
        ("a: 1\n---\nb: 2\n", "second document", 2),
        ("a: " + "[" * 9 + "]" * 9, "levels deep", 1),
        ("a: " + "[" * 100_000, "levels deep", 1),
        ("a:\n\tb: 1\n", "a tab", 2),
        ("a: 1\nb: x: y\n", "a second ': '", 2),
        ("a: 1\nbroken\nc: 2\n", "no ': '", 2),
        ("a: 1\n  b: 2\n", "", 2),
        ('a: 1\nb: "open\n', "not closed", None),
        ("a: [1, 2\nb: 3\n", "not closed", None),
        ("a: \x07\n", "U+0007", 1),
        ('{"a": "\\ud83d"}', "half of a character", 1),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text, message, line):
    with pytest.raises(YamlProblem) as caught:
        parse(text, "run.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if line is not None:
        assert caught.value.line == line


def test_eight_levels_are_allowed():
    assert values("a: " + "[" * 7 + "]" * 7)["a"] == [[[[[[[]]]]]]]


def test_json_is_read_whatever_its_layout():
    value = {"a": "tab\there, \u2028 line, \U0001f600, /", "b": {"c": [1.5e-7, None, True]}, "d": "no"}
    for text in (
        json.dumps(value),
        json.dumps(value, ensure_ascii=False),
        json.dumps(value, indent="\t"),
        json.dumps(value, separators=(",", ":")),
    ):
        assert values(text) == value


def test_json_with_a_key_twice_is_a_problem():
    assert parse('{"a": 1,\n "a": 2}', "c.json")[1] == ["c.json:2: 'a' is given twice; first in line 1"]


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    entries, problems = read_file(tmp_path / "run.yaml")
    assert [(entry.name, entry.value) for entry in entries] == [("a", 1), ("b", 2)]
    assert problems == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\n".encode("utf-16"), "is UTF-16"),
        (b"a: 1\nb: \xff\n", ":2: is not UTF-8"),
        (b"a: " + b"x" * MAX_NUM_BYTES, "is larger than 1,000,000 bytes"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_file(tmp_path / "run.yaml")


def test_a_file_that_is_not_there_names_the_one_that_is(tmp_path):
    (tmp_path / "run.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"run\.yml: no such file; did you mean '.*run\.yaml'"):
        read_file(tmp_path / "run.yml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_file(tmp_path)
