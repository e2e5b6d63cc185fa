"""The options of all recipes, in groups. A recipe's configuration is one flat model that inherits the groups
it needs.

The docstring under a field is its help text, on the command line and in the documentation.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from toolkit.config.conflicts import conflicts

Precision = Literal["auto", "no", "bf16", "fp16"]
LossTarget = Literal["assistant", "last-assistant", "completion", "all"]
OverlongPolicy = Literal["drop", "truncate", "split", "error"]

PLAIN_MODULE_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")
GPU_NUMBERS = re.compile(r"\d+(,\d+)*")


def _interval(value: str) -> str:
    if value in ("epoch", "never") or (value.isdecimal() and int(value) >= 1):
        return value
    raise ValueError(f"'{value}' is not epoch, never, or a number of steps of at least 1")


def _gpu_numbers(value: str) -> str:
    value = value.replace(" ", "")
    if not GPU_NUMBERS.fullmatch(value):
        raise ValueError(f"'{value}' is not a list of GPU numbers like 0 or 0,1")
    if len(set(value.split(","))) < len(value.split(",")):
        raise ValueError(f"'{value}' names a GPU twice")
    return value


def _module_names(value: str | list[str]) -> str | list[str]:
    # peft takes a single name for a regular expression that has to match the whole path of a module, so that
    # "q_proj" would match nothing. Plain names are endings, as in a list.
    if isinstance(value, str) and value != "all-linear" and PLAIN_MODULE_NAMES.fullmatch(value):
        return [name.strip() for name in value.split(",")]
    return value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Interval = Annotated[str, BeforeValidator(_as_text), AfterValidator(_interval)]
GpuNumbers = Annotated[str, BeforeValidator(_as_text), AfterValidator(_gpu_numbers)]
ModuleNames = Annotated[str | list[str], AfterValidator(_module_names)]


@dataclass(frozen=True)
class Synonym:
    """Another name of an option.

    Attributes:
        option: what is meant.
        adds: the other name is a switch, which adds this to the option, a list; "" for a name that takes the option's
            own value.
    """

    option: str
    adds: str = ""


class Options(BaseModel):
    """Base of all option groups: unknown names are errors, values are never changed after validation."""

    synonyms: ClassVar[Mapping[str, Synonym]] = {}
    """Other names of options, in files and on the command line."""

    unavailable: ClassVar[Mapping[str, str]] = {}
    """Options of an inherited group that a recipe refuses, each with the reason. They have no flag."""

    is_part: ClassVar[bool] = False
    """A part of a recipe's options: rules between options are left to the whole."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=False,
        allow_inf_nan=False,
        defer_build=True,
    )

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        found = [] if self.is_part else conflicts(self)
        if found:
            text = "; ".join(f"{'.'.join(c.place)} {c.message}" for c in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": found})
        return self


class ModelOptions(Options):
    """Model"""

    model: str
    """The base model: a hub id, a folder in the Hugging Face layout, or a .gguf file."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    tokenizer: str | None = None
    """Tokenizer, when it is not the model's own: a hub id or a folder."""

    chat_template: Path | None = None
    """File with a Jinja chat template that replaces the tokenizer's own, in training and in final_model/."""

    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What is trained: a language model, or a classifier of whole texts."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which the base is held. auto: under an adapter the checkpoint's own on a GPU, that of the computation on
    a CPU; else float32."""

    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention kernel. auto: sdpa."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class AdapterOptions(Options):
    """Adapter"""

    finetuning: Literal["lora", "full"] = "lora"
    """lora: train an adapter on a frozen base. full: train every weight."""

    lora_r: int = Field(16, ge=1)
    """Rank of the adapter."""

    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the adapter: alpha / r, or alpha / sqrt(r) with --use-rslora."""

    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapter."""

    lora_target_modules: ModuleNames = "all-linear"
    """Modules that get an adapter: all-linear, a list of name endings (q_proj,v_proj), or a regular
    expression."""

    lora_modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole and saved with the adapter, besides a classifier's head."""

    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""

    use_dora: bool = False
    """Weight-decomposed adaptation (Liu et al. 2024, arXiv:2402.09353)."""


class QuantizationOptions(Options):
    """Quantization of the frozen base"""

    load_in_4bit: bool = False
    """Hold the base in 4 bits (bitsandbytes); with LoRA this is QLoRA (Dettmers et al. 2023,
    arXiv:2305.14314)."""

    load_in_8bit: bool = False
    """Hold the base in 8 bits (bitsandbytes LLM.int8)."""

    nested_quant: bool = True
    """With 4 bits: quantize the quantization constants too (about 0.4 bits a weight less)."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """With 4 bits: the code book."""


class RowOptions(Options):
    """Data"""

    data: str
    """Training data: a .json, .jsonl, .csv or .parquet file, a folder of such files or saved with datasets,
    or a data set's hub id (NAME, or NAME:CONFIGURATION)."""

    eval_data: str | None = None
    """Held-out data in any of these forms. Without it, a split named validation or test in --data, else
    --eval-fraction."""

    train_split: str = "train"
    """Name of the training split, where the data has splits."""

    eval_split: str | None = None
    """Name of the held-out split. Without it: validation, valid, eval, dev or test, the first that is
    there."""

    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the training rows that is held out (by --seed) when there is no other held-out data."""

    data_format: str = "auto"
    """Format of the rows, by name (meldkit data formats lists them). auto: recognised by the columns."""

    data_mapping: dict[str, str] = Field(default_factory=dict)
    """Columns under other names: FIELD=COLUMN, e.g. prompt=question,completion=answer."""

    locale: str | None = None
    """Only the rows of this locale, where the data has a column named locale."""

    max_length: int = Field(1536, ge=8)
    """Longest sequence in tokens, prompt and answer together."""

    loss_on: LossTarget = "assistant"
    """Tokens that are trained: every assistant turn, the last one, the completion, or all. Plain text is
    always trained whole."""

    max_rows: int | None = Field(None, ge=1)
    """Use the first N rows of the training data only."""


class PreparationOptions(Options):
    """Data"""

    overlong: OverlongPolicy = "error"
    """Rows over --max-length: leave them out, cut their end, cut a conversation between turns, or stop."""

    packing: bool = False
    """Put several short rows into one sequence; they do not see each other."""

    skip_data_check: bool = False
    """Start although the data check finds problems; they are printed and recorded all the same."""

    min_trainable_share: float = Field(0.005, ge=0, le=1)
    """Data check: stop when a smaller share of the tokens is trained."""

    max_lost_rows: float = Field(0.1, ge=0, le=1)
    """Data check: stop when --overlong drop or truncate touches a larger share of the rows."""

    max_duplicates: float = Field(0.5, ge=0, le=1)
    """Data check: stop when a larger share of the rows repeats an earlier row."""

    max_leaks: float = Field(0.0, ge=0, le=1)
    """Data check: stop when a larger share of the held-out rows is also in the training data."""

    data_cache: Path | None = None
    """Folder of the tokenised cache. Default: $MELDKIT_CACHE, else meldkit/ in $XDG_CACHE_HOME or
    ~/.cache."""


class BatchOptions(Options):
    """Data"""

    length_grouping: bool = False
    """Batch rows of similar length, which wastes less padding."""


class DataOptions(RowOptions, PreparationOptions, BatchOptions):
    """Data"""


class TrainingOptions(Options):
    """Training"""

    backend: Literal["hf", "unsloth"] = "hf"
    """What trains: transformers, TRL and PEFT, or the same run with Unsloth, which is for language models."""

    max_epochs: float = Field(3.0, gt=0)
    """Passes over the training data."""

    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever --max-epochs says."""

    batch_size: int = Field(1, ge=1)
    """Rows (or packed sequences) a device and step."""

    eval_batch_size: int = Field(8, ge=1)
    """Rows a device in evaluation."""

    gradient_accumulation_steps: int = Field(8, ge=1)
    """Batches whose gradients are added up before an optimizer step."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""

    lr_scheduler: str = "linear"
    """Learning rate schedule: linear, cosine, constant, constant_with_warmup, ... (transformers'
    SchedulerType)."""

    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises to its peak."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""

    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them alone."""

    optim: str = "auto"
    """Optimizer: adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_8bit, sgd, ... (transformers'
    OptimizerNames). auto: AdamW, fused with --throughput auto."""

    throughput: Literal["auto", "off"] = "auto"
    """auto: decide each of the four options below that is not given, and the precision, by the model, the rows and the
    machine; the run says what and why. None of them changes what is trained, but for rounding. off: none of it."""

    step_layout: Literal["auto", "rows", "dense"] = "auto"
    """Micro-batches of an optimizer step: rows, each batch as it comes, padded; or dense, all rows of the step laid out
    anew with little padding, in no more memory than the largest batch would take."""

    fused_loss: bool | None = None
    """Compute the loss and its gradient from the hidden states, a few tokens at a time, without the logits of the whole
    batch. Default: where the model allows it."""

    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more time. Default: where the memory is
    needed; always with --throughput off and with Unsloth."""

    tf32: bool | None = None
    """Multiply float32 matrices with 10 bits of mantissa, on GPUs that can. Default: there."""

    seed: int = Field(42, ge=0)
    """Seed of the data order, dropout, adapter initialisation and splits."""

    eval_every: Interval = "epoch"
    """When to evaluate: epoch, never, or a number of steps. There is always one evaluation before and one
    after."""

    checkpoint_every: Interval = "epoch"
    """When to commit a checkpoint: epoch, never, or a number of steps. There is always one at the end."""

    keep_checkpoints: int = Field(2, ge=2)
    """Checkpoints that are kept, newest first. At least 2: a new one counts only after it is whole."""

    logging_steps: int = Field(1, ge=1)
    """Steps between two records in training_history.json."""

    dataloader_workers: int = Field(0, ge=0)
    """Processes that prepare batches."""

    trainer_args: dict[str, Any] = Field(default_factory=dict)
    """Any other argument of the installed SFTConfig or TrainingArguments: NAME=VALUE, or a mapping in the
    YAML file."""


class LaunchOptions(Options):
    """Launch"""

    num_processes: int | None = Field(None, ge=1)
    """Processes, one a device. Default: one for each GPU that is used, one on a CPU."""

    gpu: GpuNumbers | None = None
    """GPUs to use, by number: 0 or 0,1 (a MIG slice counts as one). Default: those in
    CUDA_VISIBLE_DEVICES, else all."""

    cpu: bool = False
    """Train on the CPU although there is a GPU."""

    mixed_precision: Precision = "auto"
    """Type of the computation. auto: bf16 on a GPU that has it, else fp16; on a CPU bf16 for language models with
    --throughput auto where the CPU has instructions for it, else no."""

    deepspeed: str | None = None
    """zero1, zero2, zero3, or the path of a DeepSpeed JSON configuration."""

    main_process_port: int | None = Field(None, ge=0, le=65535)
    """Port on which the processes meet. Default: a free one."""


class RunOptions(Options):
    """Run"""

    output_dir: Path
    """Run directory. Everything that the run writes lies in it."""

    resume: bool = False
    """Continue the run in --output-dir from its last committed checkpoint."""

    merge_final: bool = False
    """Write final_model/merged/ too: the base with the adapter merged into it."""

    sample_prompts: list[str] = Field(default_factory=list, json_schema_extra={"splits_commas": False})
    """Prompt that the model answers before and after training, printed and recorded. May be given several
    times."""

    sample_system_prompt: str | None = None
    """System prompt before each sample prompt, where the training data has one."""

    sample_tokens: int = Field(48, ge=1)
    """Longest answer to a sample prompt, in tokens."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=lambda: ["tensorboard"]
    )
    """Trackers, besides the run's own files: tensorboard, wandb, trackio."""

    project: str = "meldkit"
    """Name of the project in W&B and trackio."""

    run_name: str | None = None
    """Name of the run in the trackers. Default: the name of the run directory."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Detail of training.log and of the terminal."""
