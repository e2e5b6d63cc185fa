"""Train a tiny model in the world of a plan: ``python -m trainer_probe OPTIONS RESULT`` (JSON files)."""

import json
import sys
from pathlib import Path


def main(options_path: str, result_path: str) -> int:
    from toolkit.config.options import LaunchOptions, TrainingOptions
    from toolkit.launch.plan import resolve_plan

    class Config(TrainingOptions, LaunchOptions):
        """What the launch layer reads of a recipe's configuration."""

    config = Config.model_validate_json(Path(options_path).read_text())
    plan = resolve_plan(config)

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from toolkit.training.world import assert_world, close_world, prepare_world, training_arguments

    prepare_world(plan)
    arguments = TrainingArguments(
        output_dir=f"{result_path}.out",
        max_steps=3,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **training_arguments(plan, config),
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    rows = [{"input_ids": [i % 64] * 8, "labels": [i % 64] * 8} for i in range(64)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    assert_world(plan, trainer.accelerator)
    trainer.train()
    trainer.save_model(f"{result_path}.model")
    if trainer.accelerator.is_main_process:
        result = {
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "plan": plan.as_dict(),
            "num_processes": trainer.accelerator.num_processes,
            "distributed_type": trainer.accelerator.distributed_type.value,
            "num_threads": torch.get_num_threads(),
        }
        Path(result_path).write_text(json.dumps(result))
    close_world()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
