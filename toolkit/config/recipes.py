"""The configuration of each recipe: one flat model a recipe, by the recipe's name on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field

from toolkit.config.iterative_options import HalfPrecisionOptions, IterativeOptions
from toolkit.config.iterative_rules import LOCALE_PLACEHOLDER
from toolkit.config.options import (
    AdapterOptions,
    DataOptions,
    LaunchOptions,
    ModelOptions,
    Options,
    QuantizationOptions,
    RunOptions,
    Synonym,
    TrainingOptions,
)


class CentralizedConfig(
    ModelOptions, AdapterOptions, QuantizationOptions, DataOptions, TrainingOptions, LaunchOptions, RunOptions
):
    """Train one model on all the data, in one place."""


class CentralizedUnslothConfig(CentralizedConfig):
    """Train one model on all the data, in one place, with Unsloth."""

    backend: Literal["hf", "unsloth"] = "unsloth"
    """What trains: transformers, TRL and PEFT, or the same run with Unsloth, which is for language models."""


class IterativeConfig(
    IterativeOptions,
    ModelOptions,
    AdapterOptions,
    QuantizationOptions,
    DataOptions,
    TrainingOptions,
    LaunchOptions,
    HalfPrecisionOptions,
    RunOptions,
):
    """Train many locales at once, and merge them while they train."""

    synonyms: ClassVar[Mapping[str, Synonym]] = {
        "enable_wandb": Synonym("report_to", adds="wandb"),
        "wandb_project": Synonym("project"),
    }
    unavailable: ClassVar[Mapping[str, str]] = {
        "locale": "has no place here: locales lists those that are trained, each with its own rows",
        "max_steps": "has no place here: merges come after whole epochs; max_epochs and max_rows shorten a run",
        "deepspeed": "has no place here: it shards one model, and processes train different locales",
        "sample_prompts": "has no place here: the comparison says what every model does on the same rows",
        "sample_system_prompt": "has no place here: there are no sample prompts",
        "sample_tokens": "has no place here: there are no sample prompts",
    }

    model: str = "sample:multilingual-e5-small"
    """The base model of all locales: a hub id, a folder in the Hugging Face layout, a .gguf file, or a sample model
    (sample:NAME; meldkit models lists them)."""

    task: Literal["causal-lm", "sequence-classification"] = "sequence-classification"
    """What is trained: a language model, or a classifier of whole texts."""

    data: str = "sample:intents:{locale}"
    """Training data, as a file, a folder or a hub id. {locale} stands for each locale (AmazonScience/massive:{locale});
    without it each locale gets the rows that the column named locale gives it. sample:intents:{locale} is made on first
    use (meldkit data samples)."""

    max_length: int = Field(256, ge=8)
    """Longest sequence in tokens."""

    max_epochs: float = Field(15.0, gt=0)
    """Passes of each locale over its training data: a whole number."""

    batch_size: int = Field(16, ge=1)
    """Rows (or packed sequences) a step."""

    eval_batch_size: int = Field(32, ge=1)
    """Rows at a time in evaluation."""

    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches whose gradients are added up before an optimizer step."""

    gradient_checkpointing: bool | None = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    logging_steps: int = Field(10, ge=1)
    """Steps between two records in training_history.json."""

    output_dir: Path = Path("iterative_results")
    """Run directory. Everything that the run writes lies in it."""

    @property
    def num_epochs(self) -> int:
        """``max_epochs``, which is whole here."""
        return int(self.max_epochs)

    @property
    def max_processes(self) -> int:
        """More processes than locales would have nothing to train."""
        return len(self.locales)

    def for_locale(self, locale: str) -> Self:
        """The options with which the rows of one locale are read and trained; it may be none of ``locales``, but a
        target."""
        has_own_source = LOCALE_PLACEHOLDER in self.data
        eval_data = self.eval_data
        return self.model_copy(
            update={
                "data": self.data.replace(LOCALE_PLACEHOLDER, locale),
                "eval_data": eval_data and eval_data.replace(LOCALE_PLACEHOLDER, locale),
                "locale": None if has_own_source else locale,
                "max_rows": self.max_rows_by_locale.get(locale, self.max_rows),
            }
        )


RECIPES: dict[str, type[Options]] = {
    "centralized-hf": CentralizedConfig,
    "centralized-unsloth": CentralizedUnslothConfig,
    "iterative-merge": IterativeConfig,
}
"""Configuration class of each recipe."""
