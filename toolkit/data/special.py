"""The special tokens of a tokenizer, and where they end a turn."""

import re
from typing import Any

from toolkit.errors import ModelError


class SpecialTokens:
    """Texts and ids of the tokens that a tokenizer treats as special.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.ids = set(tokenizer.all_special_ids) | {n for n, t in added.items() if t.special}
        self.texts = {t for t in tokenizer.all_special_tokens if t} | {
            str(t) for t in added.values() if t.special
        }
        self.eos = tokenizer.eos_token
        either = "|".join(re.escape(t) for t in sorted(self.texts, key=len, reverse=True)) or r"(?!)"
        self._any = re.compile(either)
        self._ending = re.compile(rf"(?:\s|{either})*\Z")

    def is_in(self, text: str) -> bool:
        return self._any.search(text) is not None

    def turn_end(self, text: str, start: int) -> tuple[int, int, bool]:
        """Where the turn that begins at ``start`` ends in ``text``, a rendering that ends with that turn.

        Returns:
            (end with EOS, end with the first special token, no special token ends the turn). The two ends
            differ for templates that close a turn with a token of their own and the conversation with EOS.
        """
        ending = self._ending.search(text, start)
        tail = ending.start() if ending else len(text)
        marks = list(self._any.finditer(text, tail))
        if not marks:
            return tail, tail, True
        eos = next((m.end() for m in marks if m.group() == self.eos), marks[0].end())
        return eos, marks[0].end(), False


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raise a ModelError when the tokenizer has no chat template.

    Args:
        tokenizer: a transformers tokenizer.
        where: place of the conversation that needs one.
    """
    if not has_chat_template(tokenizer):
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise ModelError(
            f"{name} has no chat template, and {where} is a conversation",
            hint="give one with --chat-template FILE (a Jinja file), or with --tokenizer that of an "
            "instruction-tuned model",
        )
