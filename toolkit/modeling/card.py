"""The card of the model that a run hands over."""

from pathlib import Path

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
