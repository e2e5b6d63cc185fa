"""The options of every recipe, by group: adding, removing or moving one is a decision, made here too."""

from toolkit.config.recipes import RECIPES
from toolkit.config.schema import options_of

COMMON = {
    "Model": "model* revision tokenizer chat_template task dtype attn_implementation trust_remote_code",
    "Adapter": (
        "finetuning lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save use_rslora use_dora"
    ),
    "Quantization of the frozen base": "load_in_4bit load_in_8bit nested_quant quant_type",
    "Data": (
        "data* eval_data train_split eval_split eval_fraction data_format data_mapping locale "
        "max_length loss_on max_rows overlong packing skip_data_check "
        "min_trainable_share max_lost_rows max_duplicates max_leaks data_cache length_grouping"
    ),
    "Training": (
        "backend max_epochs max_steps batch_size eval_batch_size gradient_accumulation_steps learning_rate "
        "lr_scheduler warmup_ratio weight_decay max_grad_norm optim throughput step_layout fused_loss "
        "gradient_checkpointing tf32 seed "
        "eval_every checkpoint_every keep_checkpoints logging_steps dataloader_workers trainer_args"
    ),
    "Launch": "num_processes gpu cpu mixed_precision deepspeed main_process_port",
    "Run": (
        "output_dir* resume merge_final sample_prompts sample_system_prompt sample_tokens "
        "report_to project run_name log_level"
    ),
}
PINNED = {
    "centralized-hf": COMMON,
    "centralized-unsloth": COMMON,
    "iterative-merge": {
        "Locales": "locales* target_languages max_rows_by_locale participants_per_step",
        "Merging": (
            "merge_scope merge_frequency merge_algorithm merge_parameters lora_merge optimizer_on_merge "
            "merge_gate gate_tolerance"
        ),
        "Weights of the merge": (
            "weight_calculation manual_weights similarity_features similarity_measure similarity_top_k "
            "similarity_sinkhorn"
        ),
        "Fisher information": "preweight fisher_data_mode num_fisher_examples fisher_batch_size",
        "Schedule of merges": (
            "schedule adaptive_merge_frequency min_merge_frequency max_merge_frequency adaptive_window "
            "performance_merge_trigger convergence_threshold early_stopping_patience early_stopping_threshold"
        ),
        "Safety of merges": (
            "checkpoint_before_merge retain_merge_checkpoints enable_auto_recovery max_merge_attempts "
            "merge_timeout validate_merge_integrity"
        ),
        "Comparison": "metric baselines bootstrap_samples",
        **COMMON,
        "Model": COMMON["Model"].replace("*", ""),
        "Data": COMMON["Data"].replace("*", ""),
        "Launch": COMMON["Launch"] + " fp16",
        "Run": COMMON["Run"].replace("*", ""),
    },
}
"""A star: required."""


def test_the_options_of_every_recipe_are_these():
    found = {}
    for recipe, config_class in RECIPES.items():
        groups: dict[str, list[str]] = {}
        for option in options_of(config_class).values():
            groups.setdefault(option.group, []).append(option.name + "*" * option.is_required)
        found[recipe] = {group: " ".join(names) for group, names in groups.items()}
    assert found == PINNED


def test_every_option_has_a_help_text_and_is_listed():
    for config_class in RECIPES.values():
        options = options_of(config_class)
        assert options.keys() == config_class.model_fields.keys()
        assert [name for name, option in options.items() if not option.help.endswith((".", ")"))] == []
