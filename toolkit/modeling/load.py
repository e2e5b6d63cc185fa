"""Load a base model."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GgufConfig,
)

from toolkit.dependencies import is_installed
from toolkit.errors import MissingDependencyError, ModelError
from toolkit.modeling.source import ModelSource, find_model

CLASSIFIER_HEADS = ("classifier", "score", "pre_classifier", "classification_head")
"""Names of the heads of transformers' models for sequence classification."""


def load_model_config(config: Any) -> Any:
    """The model's configuration, without its weights.

    Raises:
        ModelError: not found; or ``--max-length`` is longer than the model's positions.
    """
    source = find_model(config.model)
    model_config = _from_pretrained(AutoConfig, source, config)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and getattr(model_config, "model_type", "") in (
        "roberta",
        "xlm-roberta",
        "camembert",
    ):
        positions -= model_config.pad_token_id + 1  # these count positions from behind the pad token
    if positions is not None and config.max_length > positions:
        raise ModelError(
            f"--max-length {config.max_length} is longer than {source.name} can read ({positions} positions)",
            hint=f"--max-length {positions}",
        )
    return model_config


def load_base(
    config: Any,
    plan: Any,
    *,
    label_names: list[str] | None = None,
    pad_token_id: int | None = None,
    local_rank: int = 0,
) -> Any:
    """The base model with its weights, in ``--dtype``, quantized if asked for.

    Args:
        config: the recipe's options (ModelOptions and QuantizationOptions).
        plan: the launch plan; decides device and precision.
        label_names: names of the classes, for sequence classification.
        pad_token_id: of the tokenizer, for a base that names none; a classifier finds a row's end by it.
        local_rank: which of the machine's devices is this process's.

    Raises:
        ModelError: not found or not loadable.
        MissingDependencyError: 4 or 8 bits without bitsandbytes.
    """
    source = find_model(config.model)
    model_config = load_model_config(config)
    keywords: dict[str, Any] = {
        "dtype": base_dtype(config, plan),
        "attn_implementation": "sdpa" if config.attn_implementation == "auto" else config.attn_implementation,
    }
    model_class: Any = AutoModelForCausalLM
    if config.task == "sequence-classification":
        assert label_names is not None
        model_class = AutoModelForSequenceClassification
        model_config.num_labels = len(label_names)
        model_config.id2label = dict(enumerate(label_names))
        model_config.label2id = {name: i for i, name in enumerate(label_names)}
        keywords["config"] = model_config
    quantization = quantization_config(config, plan)
    if quantization is not None:
        keywords["quantization_config"] = quantization
        keywords["device_map"] = {"": local_rank if plan.device == "cuda" else "cpu"}
    if source.gguf_file is not None:
        # Without it the weights stay in GGUF blocks, which can be neither trained nor saved.
        keywords["quantization_config"] = GgufConfig(dequantize=True)
    else:
        keywords["use_safetensors"] = True
    model = _from_pretrained(model_class, source, config, **keywords)
    model.config.use_cache = False
    if quantization is not None:
        _keep_cpu_weights_unpacked(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return model


def quantization_config(config: Any, plan: Any) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings for ``--load-in-4bit`` and ``--load-in-8bit``; None without them."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    if not is_installed("bitsandbytes"):
        option = "--load-in-4bit" if config.load_in_4bit else "--load-in-8bit"
        raise MissingDependencyError("bitsandbytes", purpose=option)
    # A classifier's head is new and trained whole; transformers spares only the last layer of a model.
    heads = list(CLASSIFIER_HEADS) if config.task == "sequence-classification" else None
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.mixed_precision, torch.float32)
    keywords: dict[str, Any] = {}
    if plan.quant_storage is not None:
        keywords["bnb_4bit_quant_storage"] = getattr(torch, plan.quant_storage)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=heads,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.nested_quant,
        bnb_4bit_compute_dtype=compute,
        **keywords,
    )


def base_dtype(config: Any, plan: Any) -> Any:
    """``--dtype`` as torch's type, or "auto": the checkpoint's own."""
    if config.dtype == "auto":
        if config.finetuning != "lora":
            return torch.float32
        if plan.device == "cuda":
            return "auto"
        return torch.bfloat16 if plan.mixed_precision == "bf16" else torch.float32
    return getattr(torch, config.dtype)


def _keep_cpu_weights_unpacked(model: torch.nn.Module) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights at the first evaluation on CPUs with AVX512-BF16 and then computes wrong
    gradients from them; the flag is what its layer reads to decide."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def _from_pretrained(auto_class: Any, source: ModelSource, options: Any, **keywords: Any) -> Any:
    common = source.keywords(revision=options.revision, trust_remote_code=options.trust_remote_code)
    try:
        return auto_class.from_pretrained(source.name, **common, **keywords)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "give a folder on this machine, or `meldkit models` for models made from packages"
        if source.is_local:
            hint = None
        raise ModelError(f"{source.name} cannot be loaded: {first_line}", hint=hint) from error
