"""A tiny tokenizer, templates of the common families and a tiny random Llama; nothing comes from a
network."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] }}"
    "{% for call in m.get('tool_calls') or [] %}{{ '<tool_call>' + (call.function | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + CHATML
)
# Writes BOS itself, as Llama does, and ends a turn with a token that is not EOS.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' "
    "+ m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# As Qwen3: reasoning is taken out of all turns but the last, which gets an empty block where it has none.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m['content'].split('</think>')[0].replace('<think>', '').strip() "
    "if '</think>' in m['content'] else '' %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + answer }}"
    "{% else %}{{ answer }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Phi-3: a turn ends with a token of its own, the conversation with EOS.
PHI = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The generation prompt opens a thought that the rendering of an answer does not have.
UNSTABLE = CHATML.replace(
    "<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml-marks": CHATML_WITH_MARKS,
    "default-system": DEFAULT_SYSTEM,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "phi": PHI,
    "unstable": UNSTABLE,
    "no-end": NO_END,
}
SPECIAL = ["<|im_end|>", "<|im_start|>", "<s>", "</s>", "<pad>", "<|start|>", "<|end|>", "<|eot|>"]
TEXT = (
    "Hello there, how are you today? I am fine, thank you. What is the capital of France? Paris is the "
    "capital of France. "
    "user assistant system You are helpful. The sky is blue. Tell me a story about a cat. Once upon a time "
    "there was a cat. "
)


def build_tokenizer(
    template: str | None = "chatml", *, eos: str = "<|im_end|>", pad: str = "<pad>", adds_bos: bool = False
) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    if adds_bos:
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=SPECIAL,
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Builds a byte-level BPE tokenizer with a chat template of :data:`TEMPLATES` by name (None: without)."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def tiny_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=4,
        bos_token_id=2,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., Any]:
    """DataOptions with a cache of the test's own; keyword arguments override."""
    from toolkit.config.options import DataOptions

    def make(**values: Any) -> DataOptions:
        values.setdefault("data_cache", tmp_path / "cache")
        return DataOptions(**values)

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a file below tmp_path and returns its path."""

    def write(rows: Iterable[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A row of messages whose turns are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


@pytest.fixture(scope="session")
def make_chat() -> Callable[..., dict[str, Any]]:
    return chat


@pytest.fixture(scope="session")
def trained_texts() -> Callable[[Any, Any], list[str]]:
    """Texts of the runs of trained tokens of a row."""

    def texts(tokenizer: Any, row: Any) -> list[str]:
        runs: list[list[int]] = [[]]
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            if label == -100:
                runs.append([])
            else:
                assert token == label
                runs[-1].append(token)
        return [tokenizer.decode(run) for run in runs if run]

    return texts


@pytest.fixture
def namespace() -> Callable[..., SimpleNamespace]:
    return SimpleNamespace
