"""Names that users know from Hugging Face and from the training guide, and what they are called here.

An entry is only used when the name is not an option of the recipe.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.config.names import plain


@dataclass(frozen=True)
class Renamed:
    """``sentence`` completes "unknown option; ..."; ``options`` are the options that it names."""

    sentence: str
    options: tuple[str, ...]


# name elsewhere -> (option here, how to write it when the value differs too)
HERE: dict[str, tuple[str, str]] = {
    # Renamed or removed in TrainingArguments
    "evaluation_strategy": ("eval_every", "epoch, never, or a number of steps"),
    "eval_strategy": ("eval_every", "epoch, never, or a number of steps"),
    "eval_steps": ("eval_every", "a number of steps"),
    "do_eval": ("eval_every", "never, to leave the evaluation out"),
    "save_strategy": ("checkpoint_every", "epoch, never, or a number of steps"),
    "save_steps": ("checkpoint_every", "a number of steps"),
    "save_total_limit": ("keep_checkpoints", ""),
    "group_by_length": ("length_grouping", "true"),
    "train_sampling_strategy": ("length_grouping", "true instead of group_by_length"),
    "no_cuda": ("cpu", "true"),
    "use_cpu": ("cpu", "true"),
    "use_mps_device": ("cpu", "true, or nothing: NVIDIA GPUs and CPUs are used, MPS is not"),
    "fp16": ("mixed_precision", "fp16"),
    "bf16": ("mixed_precision", "bf16"),
    "fp16_opt_level": ("mixed_precision", "auto, no, bf16 or fp16; Apex levels are gone"),
    "fp16_backend": ("mixed_precision", "auto, no, bf16 or fp16"),
    "half_precision_backend": ("mixed_precision", "auto, no, bf16 or fp16"),
    "warmup_steps": ("warmup_ratio", "a share of the steps"),
    "num_train_epochs": ("max_epochs", ""),
    "num_epochs": ("max_epochs", ""),
    "epochs": ("max_epochs", ""),
    "per_device_train_batch_size": ("batch_size", ""),
    "per_gpu_train_batch_size": ("batch_size", ""),
    "train_batch_size": ("batch_size", ""),
    "micro_batch_size": ("batch_size", ""),
    "per_device_eval_batch_size": ("eval_batch_size", ""),
    "per_gpu_eval_batch_size": ("eval_batch_size", ""),
    "grad_accum": ("gradient_accumulation_steps", ""),
    "lr": ("learning_rate", ""),
    "lr_scheduler_type": ("lr_scheduler", ""),
    "optimizer": ("optim", ""),
    "adafactor": ("optim", "adafactor"),
    "gradient_clipping": ("max_grad_norm", ""),
    "use_gradient_checkpointing": ("gradient_checkpointing", ""),
    "activation_checkpointing": ("gradient_checkpointing", ""),
    "data_seed": ("seed", "one seed for everything"),
    "random_state": ("seed", ""),
    "dataloader_num_workers": ("dataloader_workers", ""),
    "logging_dir": ("output_dir", "logs lie in the run directory"),
    "overwrite_output_dir": ("output_dir", "a new folder for each run; or --resume to go on with one"),
    "out": ("output_dir", ""),
    "resume_from_checkpoint": ("resume", "true; the run directory is --output-dir"),
    "wandb_project": ("project", ""),
    "enable_wandb": ("report_to", "wandb"),
    "use_wandb": ("report_to", "wandb"),
    "include_tokens_per_second": ("logging_steps", "tokens a second are always recorded"),
    "include_inputs_for_metrics": ("trainer_args", "include_for_metrics"),
    "fsdp_min_num_params": ("deepspeed", "zero3; FSDP is not supported"),
    "fsdp_transformer_layer_cls_to_wrap": ("deepspeed", "zero3; FSDP is not supported"),
    "torchdynamo": ("trainer_args", "torch_compile_backend"),
    # Models and tokenizers
    "model_name": ("model", ""),
    "model_name_or_path": ("model", ""),
    "model_id": ("model", ""),
    "base_model": ("model", ""),
    "model_revision": ("revision", ""),
    "torch_dtype": ("dtype", ""),
    "tokenizer_name": ("tokenizer", ""),
    "tokenizer_name_or_path": ("tokenizer", ""),
    "processing_class": ("tokenizer", "a hub id or a folder"),
    "chat_template_path": ("chat_template", ""),
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
    "use_flash_attn": ("attn_implementation", "flash_attention_2"),
    "flash_attn": ("attn_implementation", "flash_attention_2"),
    # Adapters and quantization
    "lora_rank": ("lora_r", ""),
    "rank": ("lora_r", ""),
    "r": ("lora_r", ""),
    "lora_target": ("lora_target_modules", ""),
    "target_modules": ("lora_target_modules", ""),
    "modules_to_save": ("lora_modules_to_save", ""),
    "use_peft": ("finetuning", "lora or full"),
    "use_lora": ("finetuning", "lora or full"),
    "finetuning_type": ("finetuning", "lora or full"),
    "full_finetuning": ("finetuning", "full"),
    "use_4bit": ("load_in_4bit", ""),
    "load_4bit": ("load_in_4bit", ""),
    "load_in_4_bit": ("load_in_4bit", ""),
    "loadin4bit": ("load_in_4bit", ""),
    "qlora": ("load_in_4bit", "true"),
    "use_qlora": ("load_in_4bit", "true"),
    "quantization_bit": ("load_in_4bit", "true, or load_in_8bit: true"),
    "use_8bit": ("load_in_8bit", ""),
    "load_8bit": ("load_in_8bit", ""),
    "load_in_8_bit": ("load_in_8bit", ""),
    "use_nested_quant": ("nested_quant", ""),
    "bnb_4bit_use_double_quant": ("nested_quant", ""),
    "bnb_4bit_quant_type": ("quant_type", ""),
    "bnb_4bit_compute_dtype": ("mixed_precision", "bf16 or fp16"),
    # Data
    "dataset": ("data", ""),
    "dataset_name": ("data", ""),
    "train_file": ("data", ""),
    "train_data": ("data", ""),
    "train_dataset": ("data", ""),
    "validation_file": ("eval_data", ""),
    "eval_dataset": ("eval_data", ""),
    "valid_data": ("eval_data", ""),
    "dataset_train_split": ("train_split", ""),
    "dataset_test_split": ("eval_split", ""),
    "val_size": ("eval_fraction", ""),
    "validation_split": ("eval_fraction", "a share; or eval_split: a name"),
    "max_seq_length": ("max_length", ""),
    "max_seq_len": ("max_length", ""),
    "seq_length": ("max_length", ""),
    "sequence_len": ("max_length", ""),
    "cutoff_len": ("max_length", ""),
    "model_max_length": ("max_length", ""),
    "max_prompt_length": ("max_length", "prompt and answer together"),
    "truncation_mode": ("overlong", "drop, truncate, split or error"),
    "completion_only_loss": ("loss_on", "completion"),
    "assistant_only_loss": ("loss_on", "assistant"),
    "train_on_responses_only": ("loss_on", "assistant"),
    "train_on_inputs": ("loss_on", "all, to train on prompts too"),
    "mask_prompt": ("loss_on", "assistant; all trains prompts too"),
    "packing_strategy": ("packing", "true; rows in one sequence never see each other"),
    "padding_free": ("packing", "true"),
    "neat_packing": ("packing", "true"),
    "sample_packing": ("packing", "true"),
    "dataset_text_field": ("data_mapping", "text=COLUMN"),
    "max_samples": ("max_rows", ""),
    "max_train_samples": ("max_rows", ""),
    # Launch
    "num_gpus": ("num_processes", ""),
    "nproc_per_node": ("num_processes", ""),
    "gpu_ids": ("gpu", ""),
    "gpus": ("gpu", ""),
    "cuda_visible_devices": ("gpu", ""),
    "use_deepspeed": ("deepspeed", "zero2"),
    "zero_stage": ("deepspeed", "zero1, zero2 or zero3"),
    "deepspeed_config_file": ("deepspeed", "the path"),
    "master_port": ("main_process_port", ""),
}

# Removed for good; there is nothing to write instead.
GONE: dict[str, str] = {
    "use_liger_kernel": "it is not an option here; write it under 'trainer_args'",
    "save_safetensors": "it is gone: weights are always written as safetensors",
    "tpu_num_cores": "it is gone from transformers",
    "jit_mode_eval": "it is gone from transformers",
    "use_ipex": "it is gone from transformers",
    "past_index": "it is gone from transformers",
    "push_to_hub_model_id": "a run sends nothing anywhere; upload final_model/ when it is done",
    "dispatch_batches": "it is not needed: how batches are made and shared out is fixed",
    "split_batches": "it is not needed: how batches are made and shared out is fixed",
    "push_to_hub_token": "it is a secret, and options are recorded; set the environment variable HF_TOKEN",
    "hub_token": "it is a secret, and options are recorded; set the environment variable HF_TOKEN",
    "local_rank": "it is set by the launcher, never by hand",
    "do_train": "it is not needed: a recipe trains",
    "do_predict": "it is not needed: a recipe evaluates before and after training",
    "peft_config": "the adapter is described by the lora_* options",
    "formatting_func": "data_format and data_mapping describe the rows",
    "dataset_kwargs": "data_format, data_mapping and loss_on describe the rows",
    "framework": "the framework is part of the recipe's name (scripts/run_centralized.sh has --framework)",
}


def renamed(name: str, options: Collection[str] | Mapping[str, Any]) -> Renamed | None:
    """Return what ``name`` is called here, or None when it is not a known name from elsewhere.

    Args:
        name: as the user wrote it; case and dashes do not count.
        options: the options of the recipe; an entry that leads to none of them is not used.
    """
    wanted = plain(name)
    if wanted in HERE and HERE[wanted][0] in options:
        option, value = HERE[wanted]
        if option == "trainer_args":
            return Renamed(f"Hugging Face calls it {value} now; write it under 'trainer_args'", (option,))
        return Renamed(f"it is called '{option}' here" + (f" ({value})" if value else ""), (option,))
    if wanted in GONE:
        return Renamed(GONE[wanted], ())
    return None
