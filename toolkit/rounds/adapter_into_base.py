"""``final_model/merged/``: the base with the run's adapter in it, made by the merge engine and checked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from toolkit.durable import write_json
from toolkit.errors import MergeError, ModelError
from toolkit.launch.plan import LaunchPlan
from toolkit.merging.plan import MergePlan
from toolkit.merging.recipes.recipe import (
    Condition,
    InputModel,
    Location,
    MergeRecipe,
    ModelReference,
    Setting,
)
from toolkit.merging.recipes.resolve import PlanOptions, plan_merge
from toolkit.merging.streaming.engine import execute
from toolkit.modeling.logits_difference import LogitsDifference, logits_difference
from toolkit.modeling.source import find_model

_PLACE = "--merge-final"


def check_mergeable(config: Any, model_config: Any) -> None:
    """Raise, before anything is trained, where there will be no merged model.

    Raises:
        ModelError: the base is a file of blocks or quantized itself: there is nothing to merge into.
    """
    if find_model(config.model).gguf_file is not None:
        what = "is a GGUF file, whose blocks take no adapter"
    elif getattr(model_config, "quantization_config", None) is not None:
        what = "is quantized itself; a merge needs the weights that it was made from"
    else:
        return
    raise ModelError(
        f"--merge-final: {config.model} {what}",
        hint="train without it; the adapter works with any version of this base",
    )


def merge_into_base(
    config: Any, plan: LaunchPlan, adapter: Path, folder: Path, *, label_names: list[str] | None
) -> LogitsDifference:
    """Merge the adapter into its base, in float32 and rounded once to the base's own type, and compare the two.

    A 4- or 8-bit run merges into the weights that were quantized. Nothing but a few blocks of tensors is in memory
    while it is merged.

    Args:
        adapter: a saved adapter with its tokenizer.
        folder: where the merged model goes; it does not exist.
        label_names: of a classifier.

    Raises:
        ModelError, MergeError: the merge cannot be made, or its result does not compute what the adapter does.
    """
    execute(_plan(config, adapter), folder)
    if label_names:
        _name_classes(folder / "config.json", label_names)
    dtype = "float32" if plan.device == "cpu" else "auto"  # as the run held its base
    request = {
        "base": find_model(config.model).name,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "adapter": str(adapter),
        "merged": str(folder),
        "dtype": dtype,
        "label_names": label_names,
    }
    found = logits_difference(**request) if config.backend == "hf" else _apart(request)
    if not found.is_rounding:
        raise MergeError(f"{folder} does not compute what the adapter does: {found}")
    return found


def _name_classes(path: Path, names: list[str]) -> None:
    """An adapter's head says how many classes there are, and nothing of their names."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["id2label"] = {str(number): name for number, name in enumerate(names)}
    values["label2id"] = {name: number for number, name in enumerate(names)}
    write_json(path, values)


def _plan(config: Any, adapter: Path) -> MergePlan:
    base = Location(find_model(config.model).name, config.revision)
    weight = Setting((Condition(1.0),), _PLACE)
    entry = InputModel(ModelReference(base, (Location(str(adapter)),)), {"weight": weight}, _PLACE)
    text = f"merge_method: linear\nmodels:\n  - model: {config.model}+adapter\n    parameters:\n      weight: 1.0\n"
    recipe = MergeRecipe(_PLACE, text, "linear", (entry,))
    return plan_merge(recipe, PlanOptions(copy_code=config.trust_remote_code))


def _apart(request: dict[str, Any]) -> LogitsDifference:
    """In a process of its own: Unsloth has changed the models of this one."""
    command = [sys.executable, "-m", "toolkit.modeling.logits_difference", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MergeError(f"{request['merged']} could not be compared with the adapter: {last}")
    return LogitsDifference(**json.loads(done.stdout.splitlines()[-1]))
