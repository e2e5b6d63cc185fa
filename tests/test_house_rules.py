"""House rules that a reader should not have to check: unsafe calls, printing, length, ignores, scripts."""

import ast
import io
import os
import re
import shutil
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(path for folder in ("toolkit", "kernels") for path in (ROOT / folder).rglob("*.py"))
ALL_FILES = [
    *LIBRARIES,
    *sorted(
        path for folder in ("recipes", "bench", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
    ),
]
MAX_LINES = 500
MAX_FUNCTION_LINES = 50

# Modules that speak to the user's terminal; every other one returns values, raises, or sends records.
SPEAK_TO_THE_TERMINAL = re.compile(r"toolkit/(cli/.*|__main__|(.*/)?commands)\.py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


# --- what is never written

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    "eval": "runs what it is given",
    "exec": "runs what it is given",
    "os.system": "runs a line of shell",
    "os.popen": "runs a line of shell",
    "yaml.full_load": "builds objects; yaml.safe_load does not",
    "yaml.unsafe_load": "builds objects; yaml.safe_load does not",
}
SAFE_CODE = """
model.eval()
torch.load('x', weights_only=True)
yaml.load(text, Loader=yaml.CSafeLoader)
AutoModel.from_pretrained('x', trust_remote_code=config.trust_remote_code)
"""
FORBIDDEN_KEYWORDS = {
    ("trust_remote_code", True),
    ("allow_pickle", True),
    ("shell", True),
    ("weights_only", False),
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def loaders(call: ast.Call) -> list[ast.expr]:
    return [*call.args[1:], *(k.value for k in call.keywords if k.arg == "Loader")]


def unsafe_code(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, what is wrong) of each call or import that would run what came in from outside."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append((node.lineno, str(node.module)))
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if name in FORBIDDEN_CALLS:
                found.append((node.lineno, f"{name} {FORBIDDEN_CALLS[name]}"))
            if name == "yaml.load" and not any(dotted(a).endswith("SafeLoader") for a in loaders(node)):
                found.append((node.lineno, "yaml.load builds objects; yaml.safe_load does not"))
            if name == "torch.load" and keywords.get("weights_only") is not True:
                found.append((node.lineno, "torch.load without weights_only=True runs code from a pickle"))
            found += [
                (node.lineno, f"{k}={v}")
                for k, v in keywords.items()
                if isinstance(v, bool) and (k, v) in FORBIDDEN_KEYWORDS
            ]
    return found


def test_nothing_runs_what_came_in_from_outside() -> None:
    wrong = [f"{where(p, line)}: {what}" for p in LIBRARIES for line, what in unsafe_code(tree_of(p))]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os\nos.system('ls')",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import yaml\nyaml.load(text, Loader=Loader)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "Model.from_pretrained('x', trust_remote_code=True)",
        "run('ls', shell=True)",
    ],
)
def test_unsafe_code_is_seen(source: str) -> None:
    assert len(unsafe_code(ast.parse(source))) >= 1
    assert unsafe_code(ast.parse(SAFE_CODE)) == []


def test_libraries_do_not_print() -> None:
    wrong = [
        where(path, node.lineno)
        for path in LIBRARIES
        if not SPEAK_TO_THE_TERMINAL.fullmatch(path.relative_to(ROOT).as_posix())
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and dotted(node.func) == "print"
    ]
    assert wrong == [], "\n".join(wrong)


# --- style


def test_no_module_is_too_long_to_read() -> None:
    num_lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_FILES}
    assert {str(p.relative_to(ROOT)): n for p, n in num_lines.items() if n > MAX_LINES} == {}


def num_code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its ``def`` on, without the docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is None:
        return total
    return total - ((first.end_lineno or first.lineno) - first.lineno + 1)


def long_functions(source: str) -> dict[str, int]:
    """Name and number of lines of each function that is too long to read."""
    return {
        node.name: num_code_lines(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and num_code_lines(node) > MAX_FUNCTION_LINES
    }


def test_no_function_is_too_long_to_read() -> None:
    too_long = {path: long_functions(path.read_text(encoding="utf-8")) for path in ALL_FILES}
    assert {str(p.relative_to(ROOT)): found for p, found in too_long.items() if found} == {}


def test_a_long_function_is_seen() -> None:
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    docstring = '    """Say.\n\n    More.\n    """\n'
    assert long_functions(f"def f():\n{docstring}{body}") == {}
    longer = f"async def f():\n{docstring}{body}    x = 1\n"
    assert long_functions(longer) == {"f": MAX_FUNCTION_LINES + 1}
    assert long_functions("class C:\n" + "".join(f"    {line}\n" for line in longer.splitlines())) != {}


IGNORE = re.compile(
    r"#\s*(?:noqa|type:\s*ignore|pyright:\s*ignore)(?P<codes>[:\[][\w\s,:\[\]-]*?[\]\d])?(?P<reason>.*)"
)


def ignores_without_reason(source: str) -> list[int]:
    """Lines with a noqa or an ignore that names no rule, or no reason behind it or on the line above."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    wrong = []
    for line, comment in comments.items():
        if not (match := IGNORE.search(comment)):
            continue
        above = lines[line - 2].strip() if line > 1 else ""
        reason = re.search(r"[a-z]{2,}.*[a-z]{2,}", match["reason"], re.IGNORECASE)
        if not match["codes"] or not (reason or (above.startswith("#") and not IGNORE.search(above))):
            wrong.append(line)
    return wrong


def test_every_ignore_names_its_rule_and_its_reason() -> None:
    wrong = [where(p, n) for p in ALL_FILES for n in ignores_without_reason(p.read_text(encoding="utf-8"))]
    assert wrong == [], "\n".join(wrong)


def test_an_ignore_without_reason_is_seen() -> None:
    mark = "# " + "noqa"
    assert ignores_without_reason(f"import a  {mark}: F401\n") == [1]
    assert ignores_without_reason(f"import a  {mark}  because it registers itself\n") == [1]
    assert ignores_without_reason(f"import a  {mark}: F401  (registers itself)\n") == []
    assert ignores_without_reason(f"# It registers itself.\nimport a  {mark}: F401\n") == []
    assert (
        ignores_without_reason("x = f()  # pyright: " + "ignore[reportCallIssue] - the stub is wrong\n") == []
    )
    assert ignores_without_reason("x = f()  # type: " + "ignore[misc]\n") == [1]


def test_every_ignore_of_the_linter_has_a_comment() -> None:
    block = re.search(
        r"^ignore = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S
    )
    assert block is not None
    assert [line for line in block[1].splitlines() if not re.search(r'",\s+# .{12,}', line)] == []


# --- scripts


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_scripts_stop_at_the_first_error(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_setup_says_what_is_wrong_with_the_python_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup_env.sh", tmp_path / "scripts")
    command = ["bash", str(tmp_path / "scripts" / "setup_env.sh")]
    environment = {**os.environ, "PYTHON": "python-that-is-not-there"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    assert "PYTHON=python-that-is-not-there is not a Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (tmp_path / ".venv").exists()
