"""The tokenizer of a GGUF file, where transformers' conversion differs from what the file says.

Of a file with a byte-level BPE (``tokenizer.ggml.model = gpt2``) for a Llama, transformers 5.17 makes the
beginning of a sequence its end, and drops the rule by which the text is cut before BPE
(``tokenizer.ggml.pre``).
"""

from pathlib import Path
from typing import Any

from toolkit.errors import ModelError

SINGLE_DIGITS = frozenset(["smollm"])
"""Values of ``tokenizer.ggml.pre`` that take numbers digit by digit and then cut as GPT-2 does."""
SPECIAL_TOKENS = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}


def correct(tokenizer: Any, path: Path) -> None:
    """Give ``tokenizer`` the special tokens of the file, and its rule for digits.

    Args:
        tokenizer: what transformers made of the file.
        path: the .gguf file.

    Raises:
        ModelError: the file names an end token that the tokenizer does not have.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def value(key: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return None if field is None else field.contents()

    for name, attribute in SPECIAL_TOKENS.items():
        number = value(f"{name}_token_id")
        if number is None:
            continue
        token = tokenizer.convert_ids_to_tokens(int(number)) if int(number) < len(tokenizer) else None
        if token is None:
            raise ModelError(
                f"{path}: the file's {attribute} has the number {number}, and its tokenizer has "
                f"{len(tokenizer)} tokens",
                hint="give the model's own tokenizer with --tokenizer",
            )
        if getattr(tokenizer, attribute) != token:
            setattr(tokenizer, attribute, token)
    if value("pre") in SINGLE_DIGITS:
        _take_single_digits(tokenizer)


def _take_single_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
