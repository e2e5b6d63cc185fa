"""config.json of a model with an adapter: what a new head or a new vocabulary changes in it."""

import re
from collections.abc import Mapping
from typing import Any

CLASSIFIERS = re.compile(
    r"(.*\.)?(score|classifier|classifier\.out_proj|classification_head\.out_proj)\.weight"
)
INPUT_EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight")
# What the task of an adapter makes of ...ForCausalLM, ...LMHeadModel, ...ForMaskedLM and ...Model.
CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
ENDINGS = re.compile(r"(LMHeadModel|Model|For[A-Z]\w*)$")
LANGUAGE_MODEL_HEADS = ("lm_head.", "cls.")


def adapted_config(
    config: Mapping[str, Any],
    task_type: str | None,
    replaced: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The configuration of base and adapter.

    Args:
        config: of the base.
        task_type: of the adapter.
        replaced: shapes of the tensors that the adapter replaces or adds.
    """
    result = dict(config)
    for name, shape in replaced.items():
        if INPUT_EMBEDDINGS.fullmatch(name):
            result["vocab_size"] = shape[0]
        if CLASSIFIERS.fullmatch(name) and task_type in CLASSES:
            _make_classifier(result, CLASSES[task_type], shape[0])
    return result


def is_dropped(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a tensor is the head of a language model that has become a classifier."""
    became_another = before.get("architectures") != after.get("architectures")
    return became_another and name.startswith(LANGUAGE_MODEL_HEADS)


def _make_classifier(config: dict[str, Any], ending: str, num_labels: int) -> None:
    architectures = config.get("architectures") or []
    config["architectures"] = [ENDINGS.sub(ending, name) for name in architectures]
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers assumes
    if len(labels) != num_labels:
        config["id2label"] = {str(label): f"LABEL_{label}" for label in range(num_labels)}
        config["label2id"] = {f"LABEL_{label}": label for label in range(num_labels)}
