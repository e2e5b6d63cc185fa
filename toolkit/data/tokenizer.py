"""Load a tokenizer alone: no weights, and no torch."""

from pathlib import Path
from typing import Any

from toolkit.data import gguf_tokenizer
from toolkit.errors import ModelError
from toolkit.modeling.samples.catalog import sample_folder
from toolkit.paths import can_only_be_a_path


def load_tokenizer(config: Any) -> Any:
    """The tokenizer of ``config.tokenizer`` or else ``config.model``, with --chat-template and a pad token in
    place.

    A folder needs its tokenizer files only. Where there is no pad token EOS serves: rows are masked by their
    length, so it is trained all the same at the end of an answer.

    Args:
        config: has model, tokenizer, revision, chat_template and trust_remote_code.

    Raises:
        ModelError: not found, not readable, or the file of the chat template is missing or empty.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer or config.model
    path = sample_folder(name) or Path(name).expanduser()
    keywords: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None and config.tokenizer is None:  # the revision is the model's
        keywords["revision"] = config.revision
    if path.suffix == ".gguf" and path.is_file():
        source, keywords["gguf_file"] = str(path.parent), path.name
    elif path.exists():
        source = str(path)
    elif can_only_be_a_path(name):
        raise ModelError(
            f"{name} does not exist", hint="--tokenizer takes a hub id or a folder with tokenizer.json"
        )
    else:
        source = name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **keywords)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the tokenizer of {name} cannot be loaded: {lines[0][:200]}",
            hint="a folder needs tokenizer.json and tokenizer_config.json; without a network a hub id "
            "cannot be fetched",
        ) from error
    if "gguf_file" in keywords:
        gguf_tokenizer.correct(tokenizer, path)
    if config.chat_template is not None:
        tokenizer.chat_template = _template(Path(config.chat_template))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {name} has neither a pad nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template {path} cannot be read ({error})") from error
    if not text.strip():
        raise ModelError(f"the chat template {path} is empty")
    return text
