"""The options of iterative training and merging, in groups, besides those that every recipe has.

A participant is a locale here. A round is one epoch of every participant that is active; then the schedule decides
whether to merge.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from toolkit.config.options import Options

LOCALE = re.compile(r"[a-z]{2,3}([-_][A-Z][a-z]{3})?([-_]([A-Z]{2}|\d{3}))?")
LOCALE_PARTS = {2: str.upper, 4: str.title}


def _locale(text: str) -> str:
    # Locales name folders of the run directory, so nothing else may pass.
    if LOCALE.fullmatch(text):
        return text
    language, *rest = re.split("[-_]", text)
    meant = "-".join([language.lower(), *(LOCALE_PARTS.get(len(part), str)(part) for part in rest)])
    advice = f"; did you mean '{meant}'?" if LOCALE.fullmatch(meant) else ""
    raise ValueError(f"'{text}' is not a locale like en-US, sq-AL or sr-Latn{advice}")


def _each_once(locales: list[str]) -> list[str]:
    seen: set[str] = set()
    for locale in locales:
        if locale.replace("_", "-") in seen:
            raise ValueError(f"'{locale}' is given twice")
        seen.add(locale.replace("_", "-"))
    return locales


def _at_least_one(locales: list[str]) -> list[str]:
    if not locales:
        raise ValueError("names no locale; one at least, e.g. en-US,fr-FR")
    return locales


Locale = Annotated[str, AfterValidator(_locale)]
Locales = Annotated[list[Locale], AfterValidator(_each_once)]
Share = Annotated[float, Field(ge=0)]
NumRows = Annotated[int, Field(ge=1)]


class ParticipantOptions(Options):
    """Locales"""

    locales: Annotated[Locales, AfterValidator(_at_least_one)] = Field(
        json_schema_extra={"placeholder": ["en"]}
    )
    """Locales that are trained, each with its own data and optimizer: en-US,fr-FR,de-DE."""

    target_languages: Locales = Field(default_factory=list)
    """Locales that the merged model is for, with --merge-scope target. Default: all of --locales."""

    max_rows_by_locale: dict[str, NumRows] = Field(default_factory=dict)
    """Use the first N training rows only, for single locales: sq-AL=50. The others follow --max-rows."""

    participants_per_step: int = Field(1, ge=1)
    """Locales that are trained in turns, a step each, instead of an epoch after an epoch. The results are the same."""


class MergeOptions(Options):
    """Merging"""

    merge_scope: Literal["target", "each"] = "target"
    """target: one merged model for --target-languages, which every locale receives. each: every locale receives a
    mixture of its own, weighted for itself."""

    merge_frequency: int = Field(3, ge=1)
    """Epochs from merge to merge."""

    merge_algorithm: str = "linear"
    """How models are merged: linear, fisher_simple, fisher_dataset, from_optimizer, or another method of meldkit merge
    (ties, dare_ties, slerp, model_stock, ...)."""

    merge_parameters: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the algorithm: density=0.5,normalize=true."""

    lora_merge: Literal["auto", "factors", "svd"] = "auto"
    """Merging adapters. svd: the mean of the products B A, cut to the rank. factors: A and B each by themselves. auto:
    svd for linear, factors for algorithms that work element by element."""

    optimizer_on_merge: Literal["keep", "reset", "merge"] = "keep"
    """The optimizer's moments after a merge: kept, set to zero, or merged like the weights."""

    merge_gate: bool = False
    """A locale takes a merged model only if its metric does not fall; else it keeps its own weights."""

    gate_tolerance: float = Field(0.0, ge=0)
    """With --merge-gate: how far the metric may fall all the same."""


class WeightOptions(Options):
    """Weights of the merge"""

    weight_calculation: str = "similarity"
    """Where the weights come from. similarity: of the languages (URIEL). performance: each model's measured result on
    the target. num_examples: training rows. average: all alike. manual: --manual-weights."""

    manual_weights: dict[str, Share] = Field(default_factory=dict)
    """With --weight-calculation manual, the weight of every locale: en-US=0.4,fr-FR=0.3,de-DE=0.3."""

    similarity_features: Literal[
        "syntax_knn",
        "syntax_average",
        "phonology_knn",
        "phonology_average",
        "inventory_knn",
        "inventory_average",
        "featural",
        "genetic",
        "geographic",
    ] = "syntax_knn"
    """What languages are compared by: features of URIEL, shared families, or the distance between two places. *_average
    has holes, and a language that lacks too much is an error."""

    similarity_measure: Literal["cosine", "shifted"] = "cosine"
    """cosine: of the two vectors. shifted: (cosine + 1) / 2."""

    similarity_top_k: int | None = Field(None, ge=1)
    """Only the K languages that are most similar to the target, itself included, have a weight."""

    similarity_sinkhorn: int = Field(0, ge=0)
    """Iterations that balance rows and columns of the similarity matrix (Sinkhorn & Knopp 1967). 0: none."""


class FisherOptions(Options):
    """Fisher information"""

    preweight: Literal["equal", "uriel"] | None = None
    """What multiplies each model's Fisher information: the same for all, or the similarity of languages. Default: the
    weights of --weight-calculation."""

    fisher_data_mode: Literal["target", "sources", "both"] = "target"
    """Rows that fisher_dataset is estimated on: of the target languages, of each model's own, or of both."""

    num_fisher_examples: int = Field(100, ge=1)
    """Rows that fisher_dataset is estimated on, for each model."""

    fisher_batch_size: int = Field(8, ge=1)
    """Rows at a time in that estimation."""


class ScheduleOptions(Options):
    """Schedule of merges"""

    schedule: str | None = None
    """A schedule by its name: fixed, adaptive, or one that was registered in Python. Default: by the options below."""

    adaptive_merge_frequency: bool = False
    """Let the results move the number of epochs between merges, beginning with --merge-frequency."""

    min_merge_frequency: int = Field(1, ge=1)
    """With --adaptive-merge-frequency: fewest epochs from merge to merge."""

    max_merge_frequency: int = Field(10, ge=1)
    """With --adaptive-merge-frequency: most epochs from merge to merge."""

    adaptive_window: int = Field(3, ge=2)
    """Evaluations from which --adaptive-merge-frequency and --performance-merge-trigger tell a trend."""

    performance_merge_trigger: bool = False
    """Merge also between the scheduled epochs, when a locale falls behind or stands still."""

    convergence_threshold: float = Field(1e-4, gt=0)
    """For the same two: a locale stands still when its metric improves by less from evaluation to evaluation."""

    early_stopping_patience: int = Field(0, ge=0)
    """Stop training a locale after so many evaluations without an improvement. 0: never."""

    early_stopping_threshold: float = Field(0.0, ge=0)
    """With --early-stopping-patience: the smallest improvement that counts."""


class RobustnessOptions(Options):
    """Safety of merges"""

    checkpoint_before_merge: bool = False
    """Commit a checkpoint of every locale before each merge."""

    retain_merge_checkpoints: int = Field(3, ge=1)
    """Merged models that are kept in merged_models/, newest first."""

    enable_auto_recovery: bool = False
    """Go on without a merge that has failed, and take a locale that fails back to its last checkpoint, once. Without
    this a failed merge ends the run, and a locale that fails is left behind."""

    max_merge_attempts: int = Field(3, ge=1)
    """Attempts at each merge."""

    merge_timeout: float = Field(600.0, gt=0)
    """Seconds after which an attempt at a merge has failed."""

    validate_merge_integrity: bool = False
    """Check each merge: names, shapes, finite values, weights, digests of inputs and output, bounds of the values."""


class ComparisonOptions(Options):
    """Comparison"""

    metric: Literal["auto", "accuracy", "f1", "loss"] = "auto"
    """The metric that decides: gate, schedule, early stopping, comparison. auto: accuracy of a classifier, loss of a
    language model."""

    baselines: bool = True
    """Compare with the base, with training that never merges, and with the best other locale: more training time."""

    bootstrap_samples: int = Field(2000, ge=100)
    """Samples of the bootstrap behind the intervals of the comparison."""


class HalfPrecisionOptions(Options):
    """Launch"""

    fp16: bool = False
    """Compute in fp16 on a GPU, as --mixed-precision fp16. A CPU computes in float32, and the launch plan says so."""


class IterativeOptions(
    ParticipantOptions,
    MergeOptions,
    WeightOptions,
    FisherOptions,
    ScheduleOptions,
    RobustnessOptions,
    ComparisonOptions,
):
    """Iterative training and merging"""

    @property
    def targets(self) -> tuple[str, ...]:
        """The locales that a merged model is for, with ``merge_scope: target``."""
        return tuple(self.target_languages or self.locales)

    @property
    def merge_method(self) -> str:
        """The merge engine's name of the algorithm: it knows where Fisher information is used, not where it is from."""
        return "fisher" if self.merge_algorithm == "fisher_dataset" else self.merge_algorithm

    @property
    def weighting(self) -> str:
        """The name of the weighting: with a Fisher algorithm ``preweight`` decides, where it is given."""
        by_preweight = {"equal": "average", "uriel": "similarity"}
        return by_preweight[self.preweight] if self.preweight else self.weight_calculation
