"""The options of ``meldkit merge``: its own, mergekit's, and how its arguments are read.

``meldkit merge RECIPE.yml OUT`` is ``--config RECIPE.yml --out OUT``; ``--models A B C`` is ``--models A,B,C``. A path
with a comma stays whole among several words, and where it exists.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from toolkit.config.command_line import NUMBER, SWITCH_WORDS
from toolkit.config.options import Options
from toolkit.config.schema import Option, options_of

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtb]?)(i?)(b?)", re.IGNORECASE)
SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

# Flags that take several values, one word each.
SEVERAL_WORDS = ("models", "weights", "density", "fisher")
# Those of them that are paths, which may have commas.
PATHS = ("models", "fisher")
# Letters of mergekit and ours.
LETTERS = {"-j": "--num-threads", "-v": "--verbose", "-q": "--quiet"}


def num_bytes(text: str) -> int:
    """``5GB``, ``500MB``, ``2GiB``; as in mergekit ``5B`` is five billion bytes. Raises ValueError."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a size like 5GB or 500MB")
    number, unit, binary, _ = match.groups()
    factor = BINARY_UNITS.get(unit.lower(), 0) if binary else SIZE_UNITS[unit.lower()]
    if not factor or float(number) * factor < 1:
        raise ValueError(f"'{text}' is not a size of at least a byte")
    return int(float(number) * factor)


def _size(text: str) -> str:
    num_bytes(text)
    return text


def _device(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise ValueError(f"'{text}' is not one of auto, cpu, cuda, cuda:N")
    return text


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Size = Annotated[str, BeforeValidator(_as_text), AfterValidator(_size)]
Device = Annotated[str, AfterValidator(_device)]


class RecipeOptions(Options):
    """Without a recipe file"""

    method: str | None = None
    """The merge method: linear, slerp, ties, dare_ties, fisher, ... An unknown name lists them."""

    models: list[str] = Field(default_factory=list)
    """Folders or hub ids, each with adapters or without: MODEL[@REVISION][+ADAPTER]. One word each."""

    weights: list[float] = Field(default_factory=list)
    """The weight of each model; equal ones where none are given."""

    base: str | None = None
    """The model that deltas are taken from; for nearswap the one that moves; for slerp the one at t = 0, the first of
    --models where none is given."""

    density: list[float] = Field(default_factory=list)
    """Share of the elements of a delta that is kept: one number, or one for each model."""

    fisher: list[str] = Field(default_factory=list)
    """The Fisher file of each model (meldkit fisher makes them)."""

    param: dict[str, Any] = Field(default_factory=dict)
    """Any other parameter of the method, e.g. t=0.5 or t=[0,0.5,1] over the layers. May be repeated."""

    dtype: str | None = None
    """Type of the result: bfloat16, float16, float32, float64. Default: that of the inputs."""

    tokenizer_source: str | None = None
    """union, base or a model: aligns different vocabularies by token."""


class ModelsOptions(Options):
    """Models"""

    lenient: bool = False
    """Pass over keys and parameters of the recipe that nothing here knows, as mergekit does."""

    on_missing: Literal["error", "present"] = "error"
    """A tensor that some models lack: an error, or merged from the models that have it (copied from an only one)."""

    non_finite: Literal["error", "keep"] = "error"
    """NaN and infinity in an input: an error, or kept."""

    lora_mode: Literal["concat", "svd", "residual", "factors"] = "concat"
    """Merging adapters as adapters. concat: exact, the ranks add up. svd: the exact sum, cut to --lora-rank. residual:
    mean factors, and the exact rest goes into the base (--base). factors: the mean of A and of B, which is not the mean
    of the adapters."""

    lora_rank: int | None = Field(None, ge=1)
    """Rank of the result of --lora-mode svd. Default: the largest rank of the adapters."""

    allow_crimes: bool = False
    """Merge models of different architectures, by the names of their tensors."""

    unsafe_truncate_embeddings: bool = False
    """Cut embeddings to the smallest vocabulary. Right only where equal numbers mean equal tokens."""

    transformers_cache: Path | None = None
    """Where models of the hub are kept. Default: the hub's own cache."""

    trust_remote_code: bool = False
    """Copy the Python files of a model with code of its own. They are never run here."""


class RunningOptions(Options):
    """Running"""

    dry_run: bool = False
    """Print the plan (inputs, parameters, tensors, bytes, seconds) and write nothing."""

    resume: bool = False
    """Go on with a merge that was stopped or killed."""

    verify: bool = False
    """Read the result again, and compute a part of it with another backend, before it gets its name."""

    overwrite: bool = False
    """Replace the folder --out when the new one is complete."""

    seed: int = Field(0, ge=0)
    """Decides the random masks of dare and della, for any number of threads; also --random-seed."""

    random_seed: int | None = Field(None, ge=0)
    """mergekit's name of --seed."""

    num_threads: int | None = Field(None, ge=1)
    """Threads; also -j. Default: one a core."""

    backend: Literal["auto", "numba", "torch", "reference"] = "auto"
    """What computes; all give the same bits. auto: the fastest."""

    device: Device = "cpu"
    """Where methods compute that need whole matrices (regmean, tsv_m, ...): cpu, cuda, cuda:N, auto."""

    cuda: bool = False
    """Short for --device cuda."""

    hash_inputs: bool = True
    """SHA-256 of every input file, for merge_report.json."""

    remember_hashes: bool = True
    """Keep these in meldkit's cache, so that a later merge does not hash files again that have not changed since. The
    report says which were remembered; --verify computes all."""

    quiet: bool = False
    """Print errors only; also -q."""

    verbose: bool = False
    """Print the plan before the merge; also -v."""


class OutputOptions(Options):
    """Output"""

    max_shard_size: Size = "5GB"
    """Bytes of weights in one file at most."""

    out_shard_size: Size | None = None
    """mergekit's name of --max-shard-size: 5B is 5GB."""

    copy_tokenizer: bool = True
    """Write tokenizer and chat template."""

    write_model_card: bool = True
    """Write README.md."""

    report: Path | None = None
    """Write merge_report.json there as well."""


class MergekitOptions(Options):
    """Of mergekit, without effect"""

    low_cpu_memory: bool = False
    """No model is ever held in memory."""

    read_to_gpu: bool = False
    """Elements are read where they are merged."""

    multi_gpu: bool = False
    """A merge is bound by memory and disk, not by arithmetic."""

    gpu_rich: bool = False
    """Short for --cuda and three flags without effect."""

    lazy_unpickle: bool = False
    """Pickles are never read."""

    clone_tensors: bool = False
    """Every tensor of the result has bytes of its own."""

    safe_serialization: bool = True
    """The result is always safetensors."""

    async_write: bool = False
    """Every thread writes what it has merged."""

    write_threads: int | None = Field(None, ge=1)
    """--num-threads counts for writing too."""

    lora_merge_cache: Path | None = None
    """Adapters are applied while they are read; nothing is cached."""

    lora_merge_dtype: str | None = None
    """Adapters are applied in float64."""


class MergeConfig(RecipeOptions, ModelsOptions, RunningOptions, OutputOptions, MergekitOptions):
    """Merge models into one: by a recipe file of mergekit (meldkit merge RECIPE.yml OUT), or by flags. Adapters alone
    merge into an adapter."""

    config: Path | None = None
    """The recipe file; the first word that is no flag."""

    out: Path
    """Folder of the result; the second word that is no flag."""


NEEDLESS = {name: field.description or "" for name, field in MergekitOptions.model_fields.items()}


def arguments(argv: list[str]) -> list[str]:
    """The arguments in the form that all commands share: flags alone, each with one value."""
    return _Words(argv, options_of(MergeConfig)).flags()


class _Words:
    def __init__(self, argv: list[str], options: Mapping[str, Option]) -> None:
        self.rest = list(reversed(argv))
        self.options = options
        self.out: list[str] = []
        self.positional: list[str] = []

    def flags(self) -> list[str]:
        while self.rest:
            self.take(self.rest.pop())
        has_method = any(word.partition("=")[0] == "--method" for word in self.out)
        names = ["--out"] if has_method and len(self.positional) == 1 else ["--config", "--out"]
        named = [f"{name}={word}" for name, word in zip(names, self.positional, strict=False)]
        return [*named, *self.out, *self.positional[len(names) :]]

    def take(self, word: str) -> None:
        if re.fullmatch("-v{2,}", word):
            word = "-v"
        if re.fullmatch(r"-j\d+", word):
            self.out += [LETTERS["-j"], word[2:]]
            return
        word = LETTERS.get(word, word)
        if word == "--verbose" and word in self.out:
            return
        if not word.startswith("-"):
            self.positional.append(word)
            return
        self.out.append(word)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        option = self.options.get(name)
        if equals:
            if name in PATHS:
                self.out[-1:] = self.several(flag, [value])
            return
        if option is None:
            is_negation = name.startswith("no_") and name[3:] in self.options
            if not is_negation and name != "help" and word.startswith("--"):
                self.take_value()
        elif name in SEVERAL_WORDS:
            self.take_several(self.out.pop())
        elif option.kind != "switch" or (self.rest and self.rest[-1].lower() in SWITCH_WORDS):
            self.take_value()

    def take_value(self) -> None:
        if self.rest and self.is_value(self.rest[-1]):
            self.out.append(self.rest.pop())

    def take_several(self, flag: str) -> None:
        values = []
        while self.rest and self.is_value(self.rest[-1]):
            values.append(self.rest.pop())
        self.out += self.several(flag, values) or [flag]

    def several(self, flag: str, values: list[str]) -> list[str]:
        """One argument for each value; in JSON where its commas separate nothing."""
        may_have_commas = flag[2:].replace("-", "_") in PATHS
        alone = len(values) == 1
        return [
            f"{flag}={json.dumps([value])}"
            if may_have_commas and "," in value and (not alone or Path(value).expanduser().exists())
            else f"{flag}={value}"
            for value in values
        ]

    def is_value(self, word: str) -> bool:
        return not word.startswith("-") or bool(NUMBER.fullmatch(word)) or word == "-"
