"""The options of ``meldkit merge-locales``."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from toolkit.config.iterative_options import Locale, Share, WeightOptions
from toolkit.config.options import Options

Features = WeightOptions.model_fields["similarity_features"].annotation


class MergeLocalesConfig(Options):
    """Merge models that were trained for single locales into one for a target language, after training. Their weights
    come from the similarity of the languages, or are all alike, or given."""

    models_dir: Path = Path("iterative_results")
    """Folder with a folder for each locale: the run directory of iterative-merge, whose LOCALE/final_model are taken,
    or any folder of models or adapters that are named by their locales."""

    target_lang: Locale
    """Locale that the merged model is for; one of the models or not."""

    mode: Literal["similarity", "average", "manual"] = "similarity"
    """Where the weights come from: the similarity to the target (URIEL), all alike, or --manual-weights."""

    num_languages: int | None = Field(None, ge=1)
    """With similarity: merge so many models, those of the most similar languages. Default: all."""

    include_target: bool = False
    """Merge the target's own model too, where there is one."""

    manual_weights: dict[str, Share] = Field(default_factory=dict)
    """With --mode manual, the weight of every locale: en-US=0.4,fr-FR=0.6."""

    similarity_features: Features = "syntax_knn"  # pyright: ignore[reportInvalidTypeForm] - the same choices as in a run
    """What languages are compared by: a feature set of lang2vec, or a distance of URIEL."""

    method: str = "linear"
    """How models are merged: a method of meldkit merge."""

    out: Path | None = None
    """Folder to write. Default: merged_MODE_TARGET."""

    overwrite: bool = False
    """Replace what is at --out."""

    dry_run: bool = False
    """Say which models would be merged with which weights, and write nothing."""
