import pytest

from toolkit.config.yaml_file import YamlProblem
from toolkit.config.yaml_tree import parse_tree, read_tree
from toolkit.errors import ConfigError


def test_values_follow_yaml_1_2_and_know_their_lines():
    tree, problems = parse_tree("a: 1e-4\nlist:\n  - x: no\n  -\n    y: [1, 2]\n", "f.yml")
    assert problems == []
    assert tree.plain == {"a": 1e-4, "list": [{"x": "no"}, {"y": [1, 2]}]}
    assert tree.pairs["a"].line == 1
    assert tree.pairs["a"].text == "1e-4"
    assert tree.pairs["list"].line == 2
    assert [element.line for element in tree.pairs["list"].items] == [3, 5]
    assert tree.pairs["list"].items[1].pairs["y"].line == 5


def test_anchors_aliases_and_merge_keys_are_followed():
    tree, problems = parse_tree(
        "base: &b {model: x, n: 1}\none: *b\ntwo:\n  <<: *b\n  n: 2\nthree:\n  <<: [{k: 1}, {k: 2, m: 3}]\n",
        "f.yml",
    )
    assert problems == []
    assert tree.pairs["one"].plain == {"model": "x", "n": 1}
    assert tree.pairs["two"].plain == {"n": 2, "model": "x"}
    assert tree.pairs["three"].plain == {"k": 1, "m": 3}


def test_a_key_given_twice_is_a_problem_with_both_lines():
    _, problems = parse_tree("a:\n  x: 1\n  x: 2\n", "f.yml")
    assert problems == ["f.yml:3: 'x' is given twice; first in line 2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]\n", "inside its own anchor"),
        ("a: &a\n  b: *a\n", "inside its own anchor"),
        ("a: !!python/object/apply:os.system ['ls']\n", "tags are not allowed"),
        ("a: 1\n---\nb: 2\n", "a second document"),
        ("a: " + "[" * 40 + "]" * 40, "levels deep"),
    ],
)
def test_what_no_recipe_needs_is_refused(text, words):
    with pytest.raises(YamlProblem, match=words):
        parse_tree(text, "f.yml")


def test_aliases_that_unfold_into_a_huge_tree_are_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(YamlProblem, match="unfolds into more than 100,000"):
        parse_tree("\n".join(lines), "f.yml")


def test_a_file_that_is_not_yaml_is_one_error_with_its_line(tmp_path):
    path = tmp_path / "f.yml"
    path.write_text("a: b: c\n")
    with pytest.raises(ConfigError, match=r"f\.yml:1: a second ': '"):
        read_tree(path)
