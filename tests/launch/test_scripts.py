"""scripts/run_*.sh: what they find, pass on and say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "run_centralized.sh"
ITERATIVE = ROOT / "scripts" / "run_iterative_merge.sh"
SCRIPTS = [SCRIPT, ITERATIVE, ROOT / "scripts" / "find_python.sh"]


def run_script(
    script: Path, *arguments: str, environ: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments], env=environ, cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the scripts and recipes that print where they run and what they got."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "recipes").mkdir()
    for script in SCRIPTS:
        shutil.copy(script, tmp_path / "scripts")
    for name in ("centralized_hf", "centralized_unsloth", "iterative_merge"):
        recipe = f"import os, sys\nprint({name!r}, os.getcwd(), *sys.argv[1:], sep='|')\nsys.exit(75)\n"
        (tmp_path / "recipes" / f"{name}.py").write_text(recipe)
    return tmp_path / "scripts" / SCRIPT.name


@pytest.fixture
def active_environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "VIRTUAL_ENV": sys.prefix}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_script_is_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    shellcheck = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([str(shellcheck), str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("framework", "recipe"),
    [
        ([], "centralized_hf"),
        (["--framework", "hf"], "centralized_hf"),
        (["--framework=hf"], "centralized_hf"),
        (["--framework", "unsloth"], "centralized_unsloth"),
    ],
)
def test_options_go_on_unchanged_from_where_the_user_stands(
    project: Path, active_environment: dict[str, str], tmp_path: Path, framework: list[str], recipe: str
) -> None:
    options = ["--gpu", "0", "--run-name", "two words", "--sample-prompts", "", "--max-epochs", "1"]
    result = run_script(project, *framework, *options, environ=active_environment, cwd=tmp_path / "recipes")
    assert result.returncode == 75  # the recipe's exit status
    assert result.stdout.rstrip("\n").split("|") == [recipe, str(tmp_path / "recipes"), *options]


def test_options_of_iterative_merging_go_on_unchanged(
    project: Path, active_environment: dict[str, str], tmp_path: Path
) -> None:
    options = ["--gpu", "0,1", "--locales", "en-US,fr-FR", "--run-name", "two words", "--sample-prompts", ""]
    script = project.with_name(ITERATIVE.name)
    result = run_script(script, *options, environ=active_environment, cwd=tmp_path / "recipes")
    assert result.returncode == 75
    assert result.stdout.rstrip("\n").split("|") == ["iterative_merge", str(tmp_path / "recipes"), *options]


def test_help_of_iterative_merging_needs_no_installation(project: Path) -> None:
    result = run_script(project.with_name(ITERATIVE.name), "--help", environ={"PATH": "/usr/bin:/bin"})
    assert result.returncode == 0
    assert "--locales en-US,fr-FR,de-DE" in result.stdout


def test_help_needs_no_installation(project: Path) -> None:
    result = run_script(project, "--help", environ={"PATH": "/usr/bin:/bin"})
    assert result.returncode == 0
    assert "--framework hf|unsloth" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--framework", "jax"], "there is no framework 'jax'"),
        (["--framework"], "--framework needs a value"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(project: Path, arguments: list[str], message: str) -> None:
    result = run_script(project, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert not result.stdout


def test_without_meldkit_it_says_what_to_do(project: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    result = run_script(project, environ={"PATH": str(tools)})
    assert result.returncode == 2
    assert "meldkit is not installed" in result.stderr
    assert "make setup" in result.stderr


def test_the_real_recipe_answers_a_dry_run(active_environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    options = [
        "--model",
        "some/model",
        "--data",
        "rows.jsonl",
        "--eval-data",
        "rows.jsonl",
        "--output-dir",
        "run",
    ]
    result = run_script(SCRIPT, "--gpu", "0", "--dry-run", *options, environ=active_environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Launch plan" in result.stdout
    assert not (tmp_path / "run").exists()
