"""``final_model/``: what a run hands over, whole or not at all."""

from pathlib import Path
from typing import Any

from toolkit.durable import STAGING_PREFIX, commit_folder, discard_folder
from toolkit.launch.plan import LaunchPlan
from toolkit.modeling.card import write_card
from toolkit.rounds.adapter_into_base import merge_into_base
from toolkit.training.contract import ParticipantTrainer


def write_final_model(
    run_dir: Path,
    trainer: ParticipantTrainer,
    tokenizer: Any,
    *,
    config: Any,
    plan: LaunchPlan,
    recipe: str,
    label_names: list[str] | None,
    rows: list[tuple[str, str]],
    processes: Any,
) -> Path:
    """Save adapter or model, tokenizer, chat template and card; with ``--merge-final`` the merged model too.

    Called on all processes.

    Args:
        run_dir: the run directory; a final_model/ that a killed run left there is replaced.
        trainer: of the participant whose model it is.
        label_names: of a classifier.
        rows: results for the card; what merging measured is added.
        processes: accelerate's PartialState.
    """
    final, staged = run_dir / "final_model", run_dir / f"{STAGING_PREFIX}final_model"
    if processes.is_main_process:
        if staged.exists():  # of a process that was killed
            discard_folder(staged)
        staged.mkdir(parents=True)
    processes.wait_for_everyone()
    trainer.save_model(staged)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return final
    is_lora = config.finetuning == "lora"
    if is_lora and label_names:
        # The names of the classes, and how many: an adapter's folder does not say.
        trainer.model.config.save_pretrained(str(staged))
    write_card(staged, recipe=recipe, base=config.model, is_adapter=is_lora, rows=rows)
    if config.merge_final and is_lora:
        beside = run_dir / f"{STAGING_PREFIX}merged"  # the engine does not write into an input
        if beside.exists():
            discard_folder(beside)
        difference = merge_into_base(config, plan, staged, beside, label_names=label_names)
        beside.rename(staged / "merged")
        rows.append(("Merged model, largest difference of logits", str(difference)))
    if final.exists():
        discard_folder(final)
    commit_folder(staged, final, {"step": trainer.step})
    return final
