"""The model card of a merge."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import yaml

from toolkit.merging.recipes.model_inputs import ModelInput
from toolkit.merging.recipes.recipe import Location, MergeRecipe, ModelReference
from toolkit.merging.registry import MergeMethod
from toolkit.paths import can_only_be_a_path

TEMPLATE = """---
{front}---

# Merge by {method}

Merged with meldkit {version}.

## Method

**{method}**: {summary} ({paper}){base}

## Models

{models}

## Configuration

```yaml
{recipe}
```

`merge_report.json` has the checksums of the inputs and the weights that each model got.
"""


def card(recipe: MergeRecipe, method: MergeMethod, inputs: Mapping[ModelReference, ModelInput]) -> str:
    """Markdown with the metadata that the hub reads."""
    merged = [reference for reference in inputs if reference != recipe.base_model]
    parts = [part for reference in inputs for part in (reference.model, *reference.loras)]
    hub_ids = list(dict.fromkeys(part.path for part in parts if is_hub_id(part)))
    front = {"base_model": hub_ids, "base_model_relation": "merge", "library_name": "transformers"}
    if not hub_ids:
        front = {"library_name": "transformers"}
    base = f", with {_named(recipe.base_model)} as base model" if recipe.base_model else ""
    return TEMPLATE.format(
        front=yaml.safe_dump({**front, "tags": ["merge", "meldkit"]}, sort_keys=False, allow_unicode=True),
        method=method.name,
        version=metadata.version("meldkit"),
        summary=method.summary.rstrip("."),
        paper=method.paper,
        base=f"{base}.",
        models="\n".join(f"- {_named(reference)}" for reference in merged or inputs),
        recipe=recipe.text.strip(),
    )


def is_hub_id(location: Location) -> bool:
    """Whether the name of a model is one of the hub: no folder here, and of the form NAME or OWNER/NAME."""
    return not can_only_be_a_path(location.path) and not Path(location.path).expanduser().exists()


def _named(reference: ModelReference) -> str:
    return " + ".join(
        f"[{part}](https://huggingface.co/{part.path})" if is_hub_id(part) else f"`{part}`"
        for part in (reference.model, *reference.loras)
    )
