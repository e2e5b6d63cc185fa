import shutil
import subprocess

import pytest

from toolkit.cli.completion import script
from toolkit.config.recipes import RECIPES

COMPLETE = """
source {file}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_LINE="${{COMP_WORDS[*]}}"
COMP_POINT=${{#COMP_LINE}}
_shtab_meldkit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def complete(tmp_path):
    (tmp_path / "meldkit.bash").write_text(script("bash"))

    def call(words: str) -> set[str]:
        text = COMPLETE.format(file=tmp_path / "meldkit.bash", words=words)
        result = subprocess.run(
            ["bash", "-c", text], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        return set(result.stdout.split())

    return call


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_recipes_options_and_choices(complete):
    assert {"train", "data", "models", "completion"} <= complete('meldkit ""')
    assert complete("meldkit train centr") == {"centralized-hf"}
    assert complete("meldkit train centralized-hf --load-in") == {"--load-in-4bit", "--load-in-8bit"}
    assert complete("meldkit train centralized-hf --no-pack") == {"--no-packing"}
    assert complete("meldkit train centralized-hf --quant-type n") == {"nf4"}
    assert complete("meldkit data ch") == {"check"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_shell_knows_every_option(shell):
    text = script(shell)
    for config_class in RECIPES.values():
        for name in config_class.model_fields:
            assert name.replace("_", "-") in text, name
