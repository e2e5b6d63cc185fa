"""Iterative training of language models, from chat rows."""

import json

import pytest

from toolkit.rounds.loop import score_of


@pytest.fixture(scope="module")
def chats(tmp_path_factory, chat_data):
    """The conversations twice, in the other order for fr-FR."""
    folder = tmp_path_factory.mktemp("chats")
    for locale, turn in (("en-US", 1), ("fr-FR", -1)):
        for name, path in chat_data.items():
            (folder / f"{locale}-{name}.jsonl").write_text(
                "".join(path.read_text().splitlines(keepends=True)[::turn])
            )
    return folder


def options(chats, tiny_model) -> list[object]:
    given = ["--task", "causal-lm", "--model", tiny_model, "--data", f"{chats}/{{locale}}-train.jsonl"]
    given += [
        "--eval-data",
        f"{chats}/{{locale}}-valid.jsonl",
        "--locales",
        "en-US,fr-FR",
        "--max-length",
        160,
    ]
    return [*given, "--batch-size", 8, "--max-epochs", 2, "--merge-frequency", 1, "--learning-rate", "1e-2"]


@pytest.mark.parametrize(
    "how",
    [(), pytest.param(("--finetuning", "full", "--learning-rate", "1e-3"), marks=pytest.mark.slow)],
    ids=["lora", "full"],
)
def test_language_models(iterate, tmp_path, chats, tiny_model, how):
    given = options(chats, tiny_model)
    if how:
        del given[-2:]
    run = iterate(tmp_path / "run", *given, *how, "--weight-calculation", "performance", defaults=False)
    assert run.status == 0, run.err
    assert run.merge_epochs == [1, 2]
    assert run.weights["en-US"] == run.weights["fr-FR"]
    # Of a language model what counts is exp(-loss) on the target's rows; these targets hold the same rows.
    for merge in run.merges:
        assert sum(merge["weights"]["en-US,fr-FR"].values()) == pytest.approx(1)
    before, *_, after = (m["before"]["en-US"]["loss"] for m in run.merges)
    assert after < before
    assert score_of(run.merges[-1]["after"]["en-US"], "auto") == -run.merges[-1]["after"]["en-US"]["loss"]
    comparison = run.read("final_statistics.json")["comparison"]
    assert (comparison["metric"], comparison["higher_is_better"]) == ("loss", False)
    arms = comparison["participants"]["fr-FR"]["arms"]
    assert arms["iterative"]["value"] == arms["last_merge"]["value"] < arms["base"]["value"]
    assert arms["iterative"]["value"] == pytest.approx(run.merges[-1]["after"]["fr-FR"]["loss"], rel=1e-6)
    load(run.folder / "final_model", tiny_model, is_adapter=not how)


def load(folder, tiny_model, *, is_adapter: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if is_adapter:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder))
    else:
        AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert json.loads((folder / "manifest.json").read_text())
