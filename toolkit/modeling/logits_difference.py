"""Whether a merged model computes what the base with its adapter does: ``python -m toolkit.modeling.logits_difference
JSON`` for a process that cannot load plain models any more."""

import dataclasses
import gc
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

NUM_TOKENS = 64
"""Of the probe: the vocabulary, at equal distances."""
LARGEST_ROUNDING = 0.1
"""Root mean square of the logits' differences over their standard deviation. Rounding all weights of a model to
bfloat16 (2^-9) gives about 0.01; an adapter that is missing, or on the wrong weights, gives as much as its effect."""


@dataclass(frozen=True)
class LogitsDifference:
    """Of merged model and adapter on one probe.

    Attributes:
        largest: absolute difference of a logit.
        relative: root mean square of the differences over the standard deviation of the logits.
        effect: the same between the base without and with its adapter: what the merge is about.
    """

    largest: float
    relative: float
    effect: float

    @property
    def is_rounding(self) -> bool:
        return self.relative <= LARGEST_ROUNDING

    def __str__(self) -> str:
        lost = "; rounding loses most of it" if self.relative > self.effect / 2 else ""
        share = f"{self.relative:.1e} of their spread"
        return f"{self.largest:.2e} ({share}; the adapter itself makes {self.effect:.1e}{lost})"


@torch.no_grad()
def logits_difference(
    *,
    base: str,
    adapter: str,
    merged: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    label_names: list[str] | None = None,
) -> LogitsDifference:
    """Compare on the CPU, one model at a time.

    Args:
        base, adapter, merged: folders, or a hub id for the base.
        dtype: of the computation: a type's name, or "auto" for that of the files.
        label_names: of a classifier.
    """
    auto: Any = AutoModelForCausalLM if label_names is None else AutoModelForSequenceClassification
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": dtype, "use_safetensors": True}
    if label_names is not None:
        common["num_labels"] = len(label_names)
    plain = auto.from_pretrained(base, revision=revision, **common).eval()
    probe = _probe(plain.config.get_text_config().vocab_size)
    adapted = PeftModel.from_pretrained(plain, adapter).eval()
    wanted = adapted(input_ids=probe).logits.float()
    with adapted.disable_adapter():
        without = adapted(input_ids=probe).logits.float()
    del plain, adapted
    gc.collect()
    found = auto.from_pretrained(merged, **common).eval()(input_ids=probe).logits.float()
    spread = wanted.std().item() or 1.0
    return LogitsDifference(
        largest=(found - wanted).abs().max().item(),
        relative=(found - wanted).square().mean().sqrt().item() / spread,
        effect=(without - wanted).square().mean().sqrt().item() / spread,
    )


def _probe(vocabulary: int) -> torch.Tensor:
    """Token ids [1, T]."""
    return torch.linspace(0, vocabulary - 1, min(NUM_TOKENS, vocabulary)).long()[None]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(logits_difference(**json.loads(sys.argv[1])))) + "\n")
