"""The data formats: one small function a format, registered by a decorator.

A format says which fields it needs and how a row of them becomes an :data:`~toolkit.data.examples.Example`. A
new format is a function with :func:`data_format` above it; nothing else changes. The order of registration is
the order of recognition: the first format whose needed fields are all there wins.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.data.examples import ROLES, Conversation, Example, Labelled, Message, PlainText

Row = Mapping[str, Any]
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}


class RowError(ValueError):
    """A row does not keep to its format; the caller adds file and row number."""


@dataclass(frozen=True)
class DataFormat:
    """A registered format.

    Args:
        name: what --data-format takes.
        needs: fields without which a row is not of this format.
        takes: further fields that are read when they are there.
        gives: "conversation", "text" or "labelled".
        sample: one row, for the documentation and for error messages.
        build: makes an example of a row; raises :class:`RowError`.
    """

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    gives: str
    sample: Row
    build: Callable[[Row], Example]

    @property
    def summary(self) -> str:
        return (self.build.__doc__ or "").strip().split("\n")[0]


FORMATS: dict[str, DataFormat] = {}


def data_format(
    name: str, *, needs: Sequence[str], takes: Sequence[str] = (), gives: str = "conversation", sample: Row
) -> Callable[[Callable[[Row], Example]], Callable[[Row], Example]]:
    """Register a format; the first line of the function's docstring describes it to the user."""

    def register(build: Callable[[Row], Example]) -> Callable[[Row], Example]:
        FORMATS[name] = DataFormat(name, tuple(needs), tuple(takes), gives, sample, build)
        return build

    return register


def text_of(value: Any, what: str) -> str:
    """Return ``value`` if it is a string, else raise a :class:`RowError` that says what it is."""
    if isinstance(value, str):
        return value
    if value is None:
        raise RowError(f"{what} is null; a text is needed")
    raise RowError(f"{what} is {_type_name(value)}; a text is needed")


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _without_nulls(value: Any) -> Any:
    """Drop null entries, which Parquet and Arrow add to objects that lack a key of another row."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(entry) for entry in value]
    return value


def _tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} is {_type_name(value)}; a list of calls is needed")
    calls = [_without_nulls(call) for call in value]
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} has a call without a function name: {str(call)[:80]}")
        if not isinstance(function.get("arguments", {}), dict | str):
            raise RowError(
                f"{what}: the arguments of {function['name']} are neither an object nor a JSON text"
            )
    return calls


def message_of(value: Any, number: int, *, trainable: bool = True) -> Message:
    """Check one message of the OpenAI form and return it.

    Args:
        value: an object with role and content; content may be null where there are tool_calls.
        number: its position in the conversation, from 1, for the error message.
        trainable: False in a prompt.
    """
    what = f"message {number}"
    if not isinstance(value, Mapping):
        raise RowError(f"{what} is {_type_name(value)}; an object with role and content is needed")
    role = value.get("role")
    if role not in ROLES:
        raise RowError(f"{what} has the role {role!r}; known roles: {', '.join(ROLES)}")
    extra = {
        key: _without_nulls(v)
        for key, v in value.items()
        if key not in ("role", "content", "weight") and v is not None
    }
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(extra["tool_calls"], f"{what}: tool_calls")
        if role != "assistant":
            raise RowError(f"{what}: only the assistant calls tools, and the role is {role}")
    content = value.get("content")
    if content is None and extra.get("tool_calls"):
        content = ""
    weight = value.get("weight")
    return Message(
        role, text_of(content, f"the content of {what} ({role})"), extra, trainable and weight != 0
    )


def _tools(row: Row) -> tuple[Mapping[str, Any], ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(f"tools is not valid JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools is not a list of JSON schemas")
    return tuple(_without_nulls(tool) for tool in tools)


def _messages(value: Any, what: str, *, trainable: bool = True, offset: int = 0) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise RowError(
            f"{what} is {'null' if value is None else _type_name(value)}; a list of messages is needed"
        )
    if not value:
        raise RowError(f"{what} is an empty list")
    return [message_of(entry, offset + n, trainable=trainable) for n, entry in enumerate(value, 1)]


@data_format(
    "messages",
    needs=["messages"],
    takes=["tools"],
    sample={"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
)
def messages_format(row: Row) -> Conversation:
    """Conversations as OpenAI writes them: role and content."""
    return Conversation(tuple(_messages(row["messages"], "messages")), _tools(row))


@data_format(
    "sharegpt",
    needs=["conversations"],
    takes=["system", "tools"],
    sample={"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
)
def sharegpt_format(row: Row) -> Conversation:
    """Conversations as ShareGPT writes them: from (human, gpt, system) and value."""
    turns = row["conversations"]
    if not isinstance(turns, list | tuple) or not turns:
        raise RowError("conversations is not a list with at least one turn")
    messages = []
    if row.get("system"):
        messages.append(Message("system", text_of(row["system"], "system")))
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, Mapping) and turn.get("role") is not None and turn.get("from") is None:
            messages.append(message_of(turn, number))
            continue
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise RowError(f"turn {number} of conversations has no 'from'")
        speaker = turn["from"]
        role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(f"turn {number} is from {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        weight = turn.get("weight")
        messages.append(
            Message(role, text_of(turn.get("value"), f"the value of turn {number}"), {}, weight != 0)
        )
    return Conversation(tuple(messages), _tools(row))


@data_format(
    "prompt-completion",
    needs=["prompt", "completion"],
    takes=["tools"],
    sample={"prompt": "The sky is", "completion": " blue."},
)
def prompt_completion_format(row: Row) -> Conversation:
    """A prompt and its completion: two texts, or two lists of messages."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation((Message("user", prompt), Message("assistant", completion)), is_plain=True)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("prompt and completion are of two kinds; give two texts or two lists of messages")
    before = _messages(prompt, "prompt", trainable=False)
    after = _messages(completion, "completion", offset=len(before))
    return Conversation((*before, *after), _tools(row))


@data_format(
    "alpaca",
    needs=["instruction", "output"],
    takes=["input", "system"],
    sample={"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"},
)
def alpaca_format(row: Row) -> Conversation:
    """Alpaca's instruction, input (may be empty) and output."""
    instruction = text_of(row["instruction"], "instruction")
    given = text_of(row["input"], "input") if row.get("input") is not None else ""
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return _exchange(row.get("system"), prompt, text_of(row["output"], "output"))


@data_format(
    "feedback",
    needs=["user_prompt", "feedback"],
    takes=["system_prompt"],
    sample={
        "system_prompt": "You review code.",
        "user_prompt": "int x = 1",
        "feedback": "A semicolon is missing.",
    },
)
def feedback_format(row: Row) -> Conversation:
    """The guide's system_prompt, user_prompt and feedback; the feedback is the answer."""
    return _exchange(
        row.get("system_prompt"),
        text_of(row["user_prompt"], "user_prompt"),
        text_of(row["feedback"], "feedback"),
    )


def _exchange(system: Any, prompt: str, answer: str) -> Conversation:
    messages = [Message("user", prompt), Message("assistant", answer)]
    if system is not None and text_of(system, "the system prompt").strip():
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages))


@data_format(
    "massive",
    needs=["utt", "intent"],
    takes=["locale"],
    gives="labelled",
    sample={"utt": "wake me at nine", "intent": "alarm_set", "locale": "en-US"},
)
def massive_format(row: Row) -> Labelled:
    """MASSIVE's utt (the text), intent (the label) and locale."""
    return _labelled(row, "utt", "intent")


@data_format(
    "text-label",
    needs=["text", "label"],
    takes=["locale"],
    gives="labelled",
    sample={"text": "What a film!", "label": "positive"},
)
def text_label_format(row: Row) -> Labelled:
    """A text and its class, for sequence classification."""
    return _labelled(row, "text", "label")


def _labelled(row: Row, text_field: str, label_field: str) -> Labelled:
    label = row[label_field]
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise RowError(
            f"{label_field} is {'null' if label is None else _type_name(label)}; a name or a number is needed"
        )
    if isinstance(label, str) and not label.strip():
        raise RowError(f"{label_field} is empty")
    return Labelled(text_of(row[text_field], text_field), str(label), row.get("locale"))


@data_format("text", needs=["text"], gives="text", sample={"text": "Once upon a time ..."})
def text_format(row: Row) -> PlainText:
    """Plain text, trained whole."""
    return PlainText(text_of(row["text"], "text"))
