"""Tiny random models of several families, rows of ragged length, and the loop that every result is compared with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

NUM_CLASSES = 5
VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FEW_HEADS = SHAPE | {"num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _xlm_r(**more: Any) -> Any:
    config = XLMRobertaConfig(**{**SHAPE, "num_labels": NUM_CLASSES, "pad_token_id": 1, **more})
    return XLMRobertaForSequenceClassification(config)


BUILDERS: dict[str, Callable[..., Any]] = {
    "xlm-r": _xlm_r,
    # looks its positions up once for the whole batch
    "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE, num_labels=NUM_CLASSES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**FEW_HEADS)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**FEW_HEADS, tie_word_embeddings=True)),
    "llama-classifier": lambda: LlamaForSequenceClassification(
        LlamaConfig(**FEW_HEADS, num_labels=NUM_CLASSES, pad_token_id=0)
    ),
    # Conv1D, tied, positions looked up once
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, **SPECIAL)
    ),
    # norms of four-dimensional heads
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**FEW_HEADS, head_dim=8)),
    # a scaled embedding, tied to the head, and norms that multiply by 1 + weight
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**FEW_HEADS, head_dim=8, **SPECIAL)),
    # experts in one tensor of three dimensions: no rule
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**FEW_HEADS, num_local_experts=4)),
}


@pytest.fixture
def build() -> Callable[..., Any]:
    """build(name) → a tiny model with random weights, large enough ones that no gradient is negligible."""

    def make(name: str, **more: Any) -> Any:
        torch.manual_seed(0)
        model = BUILDERS[name](**more).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3)
        return model

    return make


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """rows(task) → examples of 3 to 13 tokens; of a language model the first tokens and the last are not trained."""

    def make(task: str, number: int = 7, num_classes: int = NUM_CLASSES) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(number):
            length = int(torch.randint(4, 14, (1,), generator=generator))
            ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
            ids[-1] = ids[0]  # a token that occurs twice
            label: Any = int(torch.randint(0, num_classes, (1,), generator=generator))
            if task == "causal-lm":
                label = [-100, -100, *ids[2:-1], -100]
            found.append({"input_ids": ids, "labels": label})
        return found

    return make


@pytest.fixture
def loop() -> Callable[..., dict[str, torch.Tensor]]:
    """loop(model, rows, task) → the definition: one example at a time, its gradient by autograd, squared, averaged."""

    def squared(model: Any, examples: list[dict[str, Any]], task: str) -> dict[str, torch.Tensor]:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for row in examples:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
            if task == "causal-lm":
                labels = torch.tensor(row["labels"])[1:]
                value = -torch.nn.functional.cross_entropy(logits[0, :-1], labels, reduction="sum")
            else:
                value = logits.log_softmax(-1)[0, row["labels"]]
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.detach() ** 2
        return {name: tensor / len(examples) for name, tensor in total.items()}

    return squared


@pytest.fixture
def assert_equal_fisher() -> Callable[..., None]:
    """Each tensor to 1e-5 of its norm, each element to 1e-4 of itself or 1e-6 of the tensor's largest.

    What is zero in exact arithmetic (the bias of a key) may be rounding: 1e-12 of the largest tensor.
    """

    def check(
        found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5
    ) -> None:
        assert found.keys() == expected.keys()
        largest = max(tensor.norm().item() for tensor in expected.values())
        assert largest > 0
        for name, tensor in expected.items():
            difference = (found[name] - tensor).norm().item()
            assert difference <= relative * tensor.norm().item() + 1e-12 * largest, name
            atol = 1e-6 * tensor.max().item() + 1e-12 * largest
            torch.testing.assert_close(found[name], tensor, rtol=10 * relative, atol=atol, msg=name)

    return check
