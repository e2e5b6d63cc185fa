"""Whether a trial may count. A trial that may not has a status and no number."""

import math
from collections.abc import Mapping
from typing import Any

OK = "ok"
STATUSES = {
    OK: "counts",
    "oom": "ran out of memory",
    "timeout": "took longer than --trial-minutes",
    "error": "failed",
    "fell_back": "another backend trained than the arm asks for",
    "world_size": "another number of processes trained than asked for",
    "not_finite": "a loss is not a number",
    "not_moved": "no trained tensor changed",
    "other_parameters": "other parameters were trained than in the reference",
    "other_tokens": "other tokens were trained than in the reference",
    "other_loss": "the loss before the first step is not the reference's: another model",
    "too_few_steps": "no step is left after the warm-up",
}
"""What a status means."""


def status_alone(
    arm: Any, trial: Mapping[str, Any], *, num_processes: int, warmup_steps: int
) -> tuple[str, str]:
    """Status of a finished trial by what it says of itself, and the reason in words."""
    facts = trial["facts"]
    wants_unsloth = arm.backend == "unsloth"
    if facts["unsloth"] != wants_unsloth:
        there = "is in the process" if facts["unsloth"] else "is not in the process"
        return "fell_back", f"Unsloth {there}"
    if facts["world_size"] != num_processes:
        return "world_size", f"{facts['world_size']} processes in place of {num_processes}"
    losses = [*trial["losses"], facts["initial_loss"], facts["final_loss"]]
    if not all(isinstance(loss, int | float) and math.isfinite(loss) for loss in losses):
        return "not_finite", f"losses {losses}"
    if facts["num_tensors_moved"] == 0:
        return "not_moved", f"none of {facts['num_tensors_trained']} trained tensors changed"
    if len(trial["steps"]) <= warmup_steps:
        return "too_few_steps", f"{len(trial['steps'])} steps, {warmup_steps} of them warm-up"
    return OK, ""


def status_beside(
    arm: Any, trial: Mapping[str, Any], reference: Mapping[str, Any], *, loss_tolerance: float
) -> tuple[str, str]:
    """Status of a trial that is ``ok`` alone, beside one of the reference."""
    mine, theirs = trial["facts"], reference["facts"]
    if mine["num_trainable"] != theirs["num_trainable"]:
        return (
            "other_parameters",
            f"{mine['num_trainable']:,} trained, {theirs['num_trainable']:,} in the reference",
        )
    if "tokens" not in arm.may_differ:
        for digest, what in (("token_digest", "token ids"), ("label_digest", "trained tokens")):
            if trial["rows"][digest] != reference["rows"][digest]:
                counts = [f"{rows['rows']['num_tokens']:,}" for rows in (trial, reference)]
                return "other_tokens", f"{what} differ ({counts[0]} tokens, {counts[1]} in the reference)"
    if "loss" not in arm.may_differ:
        mine_loss, their_loss = mine["initial_loss"], theirs["initial_loss"]
        if abs(mine_loss - their_loss) > loss_tolerance * abs(their_loss):
            return "other_loss", f"{mine_loss:.4f}, {their_loss:.4f} in the reference"
    return OK, ""
