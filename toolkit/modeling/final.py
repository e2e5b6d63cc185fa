"""The folder that a run hands over: ``final_model/``, and on request the adapter merged into its base."""

import gc
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from toolkit.modeling.load import load_base
from toolkit.modeling.source import find_model

CARD = """---
library_name: {library}
base_model: {base}
---
# {title}

Trained with meldkit, recipe `{recipe}`.

| | |
|---|---|
{rows}
"""


def write_card(
    folder: Path, *, recipe: str, base: str, is_adapter: bool, rows: list[tuple[str, str]]
) -> None:
    """Write the model card (README.md) of a final model."""
    source = find_model(base)
    name = Path(source.name).name if source.is_local else base
    text = CARD.format(
        library="peft" if is_adapter else "transformers",
        base=name,
        title=f"{name}, {'LoRA adapter' if is_adapter else 'fine-tuned'}",
        recipe=recipe,
        rows="\n".join(f"| {label} | {value} |" for label, value in rows),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


@torch.no_grad()
def merge_adapter(
    config: Any,
    plan: Any,
    adapter_folder: Path,
    folder: Path,
    tokenizer: Any,
    *,
    label_names: list[str] | None = None,
) -> float:
    """Merge the adapter into its base in the base's own precision and save an ordinary model.

    With a 4- or 8-bit base the adapter is merged into the unquantized weights.

    Args:
        config: the run's options.
        plan: its launch plan.
        adapter_folder: a saved adapter.
        folder: where the merged model goes.
        tokenizer: saved beside it.
        label_names: of a classifier.

    Returns:
        Largest absolute difference of the logits of merged model and adapter on a fixed input, as a check.
    """
    plain = config.model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    base = load_base(plain, plan, label_names=label_names, pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(base, str(adapter_folder)).eval()
    probe = torch.arange(8, device=base.device)[None] + 5
    before = model(input_ids=probe).logits.float()
    merged: Any = model.merge_and_unload()
    difference = (merged(input_ids=probe).logits.float() - before).abs().max().item()
    merged.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    del base, model, merged
    gc.collect()
    return difference
