"""What a row of a data file becomes: a conversation, a plain text or a labelled text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Args:
        role: one of :data:`ROLES`.
        content: the text of the turn; empty for a turn that only calls tools.
        extra: further keys that the chat template may read (``tool_calls``, ``tool_call_id``, ``name``, ...).
        trainable: False for a turn whose tokens are never trained (part of a prompt, or ``weight: 0``).
    """

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    trainable: bool = True

    def as_template_input(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order.

    Args:
        messages: the turns.
        tools: JSON schemas of the tools that the assistant may call, given to the chat template.
        is_plain: prompt and completion are strings, which a tokenizer without chat template simply joins;
            ``messages`` is then one user and one assistant turn.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    is_plain: bool = False

    def answers(self) -> list[str]:
        return [m.content for m in self.messages if m.role == "assistant" and m.trainable]

    def key(self) -> str:
        return "\x1e".join(f"{m.role}\x1f{m.content}\x1f{dict(m.extra) or ''}" for m in self.messages)


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text that is trained whole."""

    text: str

    def answers(self) -> list[str]:
        return []

    def key(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its class."""

    text: str
    label: str
    locale: str | None = None

    def answers(self) -> list[str]:
        return []

    def key(self) -> str:
        return self.text


Example = Conversation | PlainText | Labelled
