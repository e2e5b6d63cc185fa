import shutil
import subprocess

import pytest

from toolkit.cli.completion import script
from toolkit.config.recipes import RECIPES
from toolkit.modeling.samples.catalog import MODELS

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
    assert {"train", "merge", "fisher", "data", "models", "completion"} <= complete('meldkit ""')
    assert complete("meldkit train centr") == {"centralized-hf", "centralized-unsloth"}
    assert complete("meldkit train centralized-hf --backend u") == {"unsloth"}
    assert complete("meldkit train centralized-hf --load-in") == {"--load-in-4bit", "--load-in-8bit"}
    assert complete("meldkit train centralized-hf --no-pack") == {"--no-packing"}
    assert complete("meldkit train centralized-hf --quant-type n") == {"nf4"}
    assert complete("meldkit train iter") == {"iterative-merge"}
    assert complete("meldkit train iterative-merge --merge-s") == {"--merge-scope"}
    assert complete("meldkit train iterative-merge --merge-scope e") == {"each"}
    assert complete("meldkit train iterative-merge --enable") == {"--enable-auto-recovery", "--enable-wandb"}
    assert complete("meldkit train iterative-merge --wandb") == {"--wandb-project"}
    assert complete("meldkit train iterative-merge --max-s") == set()  # --max-steps has no place there
    assert complete("meldkit data ch") == {"check"}
    assert complete("meldkit data check --max-le") == {"--max-length", "--max-leaks"}
    assert complete("meldkit data check --loss-on as") == {"assistant"}
    assert complete("meldkit data check --js") == {"--json"}
    assert complete("meldkit data preview --num") == {"--num-rows"}
    assert complete("meldkit data split --cl") == {"--clients"}
    assert complete("meldkit data samples co") == {"conversations"}
    assert complete("meldkit data samples intents --loc") == {"--locales"}
    assert complete("meldkit models --o") == {"--out"}
    assert complete("meldkit merge --lora-m") == {"--lora-mode", "--lora-merge-cache", "--lora-merge-dtype"}
    assert complete("meldkit merge --lora-mode s") == {"svd"}
    assert complete("meldkit merge --no-copy") == {"--no-copy-tokenizer"}
    assert complete("meldkit fisher --num-e") == {"--num-examples"}
    assert complete("meldkit models tiny") == {name for name in MODELS if name.startswith("tiny")} != set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_shell_knows_every_option(shell):
    text = script(shell)
    for config_class in RECIPES.values():
        for name in config_class.model_fields:
            assert name.replace("_", "-") in text, name
