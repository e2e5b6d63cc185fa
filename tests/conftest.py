"""Shared by all tests: a tiny real model in an ordinary folder, a little chat data, and the command line."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["red", "rose", "wine", "sea", "sky", "blue", "leaf", "grass", "green", "sun", "moon", "star"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenised rows and sample models of the tests go into a folder of their own; downloaded wheels are shared."""
    folder = tmp_path_factory.mktemp("cache")
    previous = os.environ.get("MELDKIT_CACHE")
    os.environ["MELDKIT_CACHE"] = str(folder)
    yield folder
    if previous is None:
        del os.environ["MELDKIT_CACHE"]
    else:
        os.environ["MELDKIT_CACHE"] = previous


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Llama of 0.1 M random weights with a real tokenizer and a ChatML template."""
    from toolkit.modeling.samples import make

    return make("tiny-llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory) -> dict[str, Path]:
    """Conversations of ragged length: ``train`` (24 rows) and ``valid`` (8 rows) as JSONL."""
    generator = random.Random(0)
    folder = tmp_path_factory.mktemp("chat")
    files = {}
    for name, number in (("train", 24), ("valid", 8)):
        rows = []
        for i in range(number):
            words = " ".join(generator.choice(WORDS) for _ in range(generator.randint(2, 12)))
            question, reply = {"role": "user", "content": f"{name} {i} {words}"}, words.upper()
            rows.append({"messages": [question, {"role": "assistant", "content": reply}]})
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture(scope="session")
def meldkit():
    """Run the command line in a process of its own: meldkit("train", …) → CompletedProcess with text output."""

    def run(
        *arguments: object, timeout_seconds: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "toolkit", *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_seconds,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """An XLM-R of 0.1 M random weights."""
    from toolkit.modeling.samples import make

    return make("tiny-xlm-r", tmp_path_factory.mktemp("models") / "tiny-xlm-r")


@pytest.fixture(scope="session")
def intent_data(tmp_path_factory) -> Path:
    """Labelled requests in four locales in the layout of MASSIVE: 24 rows to train, 8 to validate, 8 to test each.

    Three classes that a few words decide; each locale has words of its own.
    """
    folder = tmp_path_factory.mktemp("intents")
    for number, locale in enumerate(("en-US", "fr-FR", "de-DE", "sq-AL")):
        generator = random.Random(number)
        (folder / locale).mkdir()
        for split, count in (("train", 24), ("validation", 8), ("test", 8)):
            rows = []
            for i in range(count):
                label = i % 3
                words = [WORDS[(number + label * 4 + generator.randint(0, 2)) % len(WORDS)] for _ in range(4)]
                utt = f"{split} {i} {' '.join(words)}"
                rows.append({"id": str(i), "locale": locale, "utt": utt, "intent": f"intent_{label}"})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / locale / f"{split}.jsonl").write_text(text)
    return folder
