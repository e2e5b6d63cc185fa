"""Examples as text with the spans that are trained.

The rule for a conversation: the trained span of an assistant turn is exactly what the model has to produce at
inference, that is, what follows ``apply_chat_template(messages[:i], add_generation_prompt=True)`` in the
rendering, up to and with the token that ends the turn. Several turns share one row as long as the template
renders them there as it renders them when they are answered. A template that rewrites earlier turns (Qwen3
takes the reasoning out of them) gives such a turn a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.data.examples import Conversation, Example, Message, PlainText
from toolkit.data.special import SpecialTokens, has_chat_template, require_chat_template
from toolkit.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as text.

    Args:
        text: the whole row.
        spans: half-open character ranges of ``text`` that are trained, in order.
        index: number of the example that it is from.
        ends_open: the last trained span has no token that ends it, so EOS is appended.
        is_template: the text is of a chat template, which writes BOS itself.
        trains_all: every token is trained.
    """

    text: str
    spans: tuple[Span, ...]
    index: int
    ends_open: bool
    is_template: bool
    trains_all: bool = False


@dataclass
class RenderCounts:
    """What rendering left out or changed, in rows and turns of the source."""

    num_empty_answers: int = 0
    num_rows_without_answer: int = 0
    num_rows_with_own_turns: int = 0
    num_turns_with_own_row: int = 0
    num_open_ends: int = 0
    num_rows_with_special_text: int = 0


@dataclass
class _Plan:
    """A conversation with the renderings that it needs."""

    index: int
    conversation: Conversation
    trained: list[int]
    prompts: dict[int, str] = field(default_factory=dict)
    answered: dict[int, str] = field(default_factory=dict)


class Renderer:
    """Renders examples for one tokenizer and one choice of --loss-on.

    Args:
        tokenizer: a transformers tokenizer.
        loss_on: "assistant", "last-assistant", "completion" or "all".
        where: gives the place of example ``index`` for messages.
    """

    def __init__(self, tokenizer: Any, loss_on: str, where: Any) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.where = where
        self.counts = RenderCounts()
        self.special = SpecialTokens(tokenizer)

    def render(self, examples: Sequence[Example], first_index: int = 0) -> list[Rendered]:
        """Render examples ``first_index``, ``first_index + 1``, ... in order; an example gives zero rows or
        more.

        Raises:
            ModelError: chat data and a tokenizer without chat template.
            DataError: the template cannot render a conversation, or not in a way that fits inference.
        """
        plans: dict[int, _Plan] = {}
        for index, example in enumerate(examples, first_index):
            if isinstance(example, Conversation) and not self._is_joined(example):
                plans[index] = _Plan(index, example, self._trained_turns(example))
        self._fill(list(plans.values()))
        rows: list[Rendered] = []
        for index, example in enumerate(examples, first_index):
            if isinstance(example, Conversation) and self.special.is_in(example.key()):
                self.counts.num_rows_with_special_text += 1
            if isinstance(example, PlainText):
                rows += self._text_row(example, index)
            elif index in plans:
                rows += self._conversation_rows(plans[index])
            elif isinstance(example, Conversation):
                rows += self._joined_row(example, index)
            else:
                raise DataError(f"{self.where(index)}: labelled rows need --task sequence-classification")
        return rows

    # plain text

    def _text_row(self, example: PlainText, index: int) -> list[Rendered]:
        if not example.text.strip():
            self.counts.num_rows_without_answer += 1
            return []
        ends = bool(self.tokenizer.eos_token) and example.text.endswith(self.tokenizer.eos_token)
        return [
            Rendered(
                example.text, ((0, len(example.text)),), index, not ends, is_template=False, trains_all=True
            )
        ]

    def _is_joined(self, example: Conversation) -> bool:
        return example.is_plain and not has_chat_template(self.tokenizer)

    def _joined_row(self, example: Conversation, index: int) -> list[Rendered]:
        prompt, answer = (message.content for message in example.messages)
        if not answer.strip():
            self.counts.num_empty_answers += 1
            self.counts.num_rows_without_answer += 1
            return []
        text = prompt + answer
        ends = bool(self.tokenizer.eos_token) and text.endswith(self.tokenizer.eos_token)
        trains_all = self.loss_on == "all"
        return [Rendered(text, ((len(prompt), len(text)),), index, not ends, False, trains_all)]

    # conversations

    def _trained_turns(self, conversation: Conversation) -> list[int]:
        """Numbers of the turns that are trained, without those whose answer is empty."""
        messages = conversation.messages
        turns = [n for n, m in enumerate(messages) if m.role == "assistant" and m.trainable]
        if self.loss_on == "last-assistant":
            turns = turns[-1:]
        elif self.loss_on == "completion":
            # Rows of prompt and completion mark the prompt; elsewhere the completion is what follows the last
            # user turn.
            has_prompt = any(not m.trainable for m in messages if m.role != "assistant")
            last_user = max(
                (n for n, m in enumerate(messages) if m.role == "user" and not has_prompt), default=-1
            )
            turns = [n for n in turns if n > last_user]
        kept = [n for n in turns if messages[n].content.strip() or messages[n].extra.get("tool_calls")]
        self.counts.num_empty_answers += len(turns) - len(kept)
        return kept

    def only_trained(self, example: Example) -> Example:
        """The conversation with every turn that this --loss-on leaves out marked so, for rendering a part of
        it."""
        if not isinstance(example, Conversation) or self.loss_on == "all":
            return example
        trained = set(self._trained_turns(example))
        messages = (replace(m, trainable=n in trained) for n, m in enumerate(example.messages))
        return replace(example, messages=tuple(messages))

    def _fill(self, plans: list[_Plan]) -> None:
        """Render what the plans need, in two batched calls of the template."""
        if not plans:
            return
        require_chat_template(self.tokenizer, self.where(plans[0].index))
        for plan in plans:
            if plan.trained and self.loss_on == "all":
                plan.trained = [len(plan.conversation.messages) - 1]
        wanted = [(plan, turn) for plan in plans for turn in plan.trained]
        if self.loss_on != "all":
            prompts = self._apply(
                [(plan, plan.conversation.messages[:turn]) for plan, turn in wanted], prompt=True
            )
            for (plan, turn), text in zip(wanted, prompts, strict=True):
                plan.prompts[turn] = text
        answered = self._apply(
            [(plan, plan.conversation.messages[: turn + 1]) for plan, turn in wanted], prompt=False
        )
        for (plan, turn), text in zip(wanted, answered, strict=True):
            plan.answered[turn] = text

    def _apply(self, requests: list[tuple[_Plan, Sequence[Message]]], *, prompt: bool) -> list[str]:
        simple = [
            n for n, (plan, messages) in enumerate(requests) if messages and plan.conversation.tools is None
        ]
        texts: dict[int, str] = {}
        if simple:
            batch = [[m.as_template_input() for m in requests[n][1]] for n in simple]
            try:
                rendered = self.tokenizer.apply_chat_template(
                    batch, tokenize=False, add_generation_prompt=prompt
                )
                texts = dict(zip(simple, rendered, strict=True))
            except (
                Exception
            ):  # whatever a template raises; the one-by-one pass below finds the row and reports it
                texts = {}
        for n, (plan, messages) in enumerate(requests):
            if n not in texts:
                texts[n] = self._apply_one(plan, messages, prompt)
        return [texts[n] for n in range(len(requests))]

    def _apply_one(self, plan: _Plan, messages: Sequence[Message], prompt: bool) -> str:
        tools = list(plan.conversation.tools) if plan.conversation.tools else None
        batch = [[m.as_template_input() for m in messages]]
        try:
            return self.tokenizer.apply_chat_template(
                batch, tools=tools, tokenize=False, add_generation_prompt=prompt
            )[0]
        except (
            Exception
        ) as error:  # a template raises Jinja's errors, and any other from inside an expression
            roles = ", ".join(m.role for m in messages) or "none"
            raise DataError(
                f"{self.where(plan.index)}: the chat template cannot render this conversation "
                f"({type(error).__name__}: {error}); roles: {roles}",
                hint="change the row, or give another template with --chat-template",
            ) from error

    def _conversation_rows(self, plan: _Plan) -> list[Rendered]:
        if not plan.trained:
            self.counts.num_rows_without_answer += 1
            return []
        if self.loss_on == "all":
            text = plan.answered[plan.trained[0]]
            is_open = self.special.turn_end(text, 0)[2]
            self.counts.num_open_ends += is_open
            return [Rendered(text, ((0, len(text)),), plan.index, is_open, True, trains_all=True)]
        rows = []
        pending = list(plan.trained)
        while pending:
            row, placed = self._shared_row(plan, pending)
            pending = [turn for turn in pending if turn not in placed]
            rows.append(row)
        if len(rows) > 1:
            self.counts.num_rows_with_own_turns += 1
            self.counts.num_turns_with_own_row += len(rows) - 1
        rows.reverse()
        return rows

    def _shared_row(self, plan: _Plan, pending: list[int]) -> tuple[Rendered, set[int]]:
        """The row that ends with the last pending turn, with all pending turns that are rendered in it as at
        inference."""
        last = pending[-1]
        host = plan.answered[last]
        spans, placed, is_open = [], set(), False
        for turn in pending:
            prompt, answered = plan.prompts[turn], plan.answered[turn]
            if not answered.startswith(prompt):
                raise self._mismatch(plan, turn, prompt, answered)
            end_full, end_short, turn_is_open = self.special.turn_end(answered, len(prompt))
            if turn == last:
                end, is_open = end_full, turn_is_open
            elif not turn_is_open and host.startswith(answered[:end_full]):
                end = end_full
            elif not turn_is_open and host.startswith(answered[:end_short]):
                end = end_short
            else:
                continue
            spans.append((len(prompt), end))
            placed.add(turn)
        # What follows the last trained token cannot change the loss of a causal model: it is left off.
        self.counts.num_open_ends += is_open
        return Rendered(host[: spans[-1][1]], tuple(spans), plan.index, is_open, is_template=True), placed

    def _mismatch(self, plan: _Plan, turn: int, prompt: str, answered: str) -> DataError:
        pairs = enumerate(zip(prompt, answered, strict=False))
        common = next((n for n, (a, b) in pairs if a != b), len(answered))
        begin = max(0, common - 20)
        return DataError(
            f"{self.where(plan.index)}: the chat template asks for turn {turn + 1} with "
            f"{prompt[begin:][:80]!r} and renders the answered turn with {answered[begin:][:80]!r}, so the "
            "model would be trained on another text than it is asked to continue",
            hint="give a template whose generation prompt is the beginning of an assistant turn, with "
            "--chat-template",
        )
