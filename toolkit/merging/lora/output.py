"""From adapter folders to a merged adapter folder: read, merge, report, commit."""

import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit import durable
from toolkit.errors import ConfigError
from toolkit.merging.lora import adapter_file, residual
from toolkit.merging.lora.adapter import Adapter
from toolkit.merging.lora.adapter_source import AdaptedSource
from toolkit.merging.lora.merge import MergedAdapter, check_options, check_same_base, merge
from toolkit.merging.lora.merge_modules import MODES, Request
from toolkit.merging.recipes.companions import TOKENIZER_FILES, copy_file
from toolkit.merging.sources import Source
from toolkit.merging.streaming.folder_source import FolderSource
from toolkit.merging.streaming.output_folder import OutputFolder, refuse_inputs
from toolkit.merging.streaming.report import REPORT_NAME, versions

ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
CARD = """---
library_name: peft
base_model: {base}
tags: [lora, merge]
---
# Merged LoRA adapter

Merged with meldkit from {number} adapters by `{mode}`: {meaning}.

| adapter | weight |
|---|---|
{rows}

Relative error of the merged product against the exact weighted sum: {error}. Details: `merge_report.json`.
"""


@dataclass(frozen=True, slots=True)
class AdapterInputs:
    """Adapters that have been read and compared, and what is to be made of them.

    Attributes:
        folders: of the adapters.
        given_weights: as the user gave them.
        weights: that are used.
        base: the model, in the mode ``residual``.
        notes: for the user.
    """

    folders: tuple[Path, ...]
    adapters: tuple[Adapter, ...]
    given_weights: tuple[float, ...] | None
    weights: tuple[float, ...]
    request: Request
    base: Source | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterMergeReport:
    """A finished merge of adapters.

    Attributes:
        out: the folder.
        adapter_folder: of the merged adapter, for PEFT.
        model_folder: of the base with the remainder, in the mode ``residual``.
        merged: what was computed.
        facts: the content of merge_report.json.
    """

    out: Path
    adapter_folder: Path
    model_folder: Path | None
    merged: MergedAdapter
    facts: dict[str, Any]

    def summary(self) -> list[str]:
        """A few lines for the user, notes last."""
        return [*self.merged.summary(), *(f"note: {note}" for note in self.facts["notes"])]


def merge_adapters(
    folders: Sequence[Path],
    weights: Sequence[float] | None,
    out: Path,
    mode: str = "concat",
    *,
    rank: int | None = None,
    normalize: bool = True,
    dtype: str | None = None,
    base: Path | Source | None = None,
    lenient: bool = False,
    overwrite: bool = False,
) -> AdapterMergeReport:
    """Merge K adapter folders into the adapter folder ``out``, never expanding one to the size of the model.

    In the mode ``residual`` ``out`` holds two folders: ``adapter`` and ``model``, the base with the remainder.

    Args:
        folders: as PEFT saved them.
        weights: negative ones too; None for equal ones.
        out: appears when everything is in it.
        mode: ``concat`` (exact), ``svd``, ``residual`` or ``factors``; see MODES.
        rank: of ``svd``; None for the largest of a module's ranks.
        normalize: divide the weights by their sum.
        dtype: of the factors; None for their own in ``factors`` and ``residual``, for float32 in the others.
        base: the model, in the mode ``residual``: its folder, or a Source (a model with an adapter).
        lenient: merge adapters of different bases or tasks, with a note.
        overwrite: replace ``out``.

    Raises:
        ConfigError: mode, weights, rank or dtype are wrong, or ``base`` is missing or superfluous.
        ModelError: an adapter cannot be read or merged, or does not fit the others or the base.
        RunDirectoryError: ``out`` exists or is an input.
    """
    inputs = read_inputs(
        folders, weights, mode, rank=rank, normalize=normalize, dtype=dtype, base=base, lenient=lenient
    )
    return merge_inputs(inputs, out, overwrite=overwrite)


def read_inputs(
    folders: Sequence[Path],
    weights: Sequence[float] | None,
    mode: str = "concat",
    *,
    rank: int | None = None,
    normalize: bool = True,
    dtype: str | None = None,
    base: Path | Source | None = None,
    lenient: bool = False,
) -> AdapterInputs:
    """Everything of :func:`merge_adapters` that comes before the arithmetic; nothing is written.

    Raises:
        ConfigError, ModelError: as :func:`merge_adapters`.
    """
    used, request = check_options(len(folders), weights, mode, rank, normalize, dtype)
    if (mode == "residual") is (base is None):
        raise ConfigError(
            [f"the mode residual needs a base, and no other mode takes one; the mode is {mode}"]
        )
    paths = tuple(Path(folder) for folder in folders)
    adapters = tuple(Adapter.from_folder(folder) for folder in paths)
    notes = check_same_base(adapters, lenient=lenient)
    source = FolderSource(str(base), Path(base)) if isinstance(base, str | Path) else base
    if source is not None:
        for adapter in adapters:
            AdaptedSource(source, adapter)  # raises where it does not fit
    given = None if weights is None else tuple(weights)
    return AdapterInputs(paths, adapters, given, tuple(used), request, source, tuple(notes))


def merge_inputs(inputs: AdapterInputs, out: Path, *, overwrite: bool = False) -> AdapterMergeReport:
    """The rest of :func:`merge_adapters`."""
    started = time.perf_counter()
    source = inputs.base
    weights_files = [folder / adapter_file.WEIGHTS_NAME for folder in inputs.folders]
    refuse_inputs(Path(out), [*weights_files, *(source.files if source else ())])
    merged = merge(inputs.adapters, inputs.weights, inputs.request)
    with OutputFolder(Path(out), uuid.uuid4().hex, overwrite=overwrite) as output:
        output.discard(output.leftovers())
        output.staged.mkdir(mode=0o755)
        try:
            folder = output.staged
            if source is not None:
                folder = output.staged / ADAPTER_FOLDER
                folder.mkdir()
                merged = residual.write(
                    merged, source, output.staged / MODEL_FOLDER, output.path / MODEL_FOLDER
                )
            facts = _facts(merged, inputs)
            _write_adapter(merged, folder, facts)
            facts["seconds"] = round(time.perf_counter() - started, 3)
            durable.write_json(output.staged / REPORT_NAME, facts)
            _sync(output.staged)
            output.commit()
        except BaseException:
            shutil.rmtree(output.staged, ignore_errors=True)
            raise
    halves = (None, None) if source is None else (output.path / ADAPTER_FOLDER, output.path / MODEL_FOLDER)
    return AdapterMergeReport(output.path, halves[0] or output.path, halves[1], merged, facts)


def _facts(merged: MergedAdapter, inputs: AdapterInputs) -> dict[str, Any]:
    """The content of merge_report.json."""
    return {
        "mode": merged.mode,
        "inputs": [
            {
                "path": str(folder),
                "sha256": durable.file_sha256(folder / adapter_file.WEIGHTS_NAME),
                "rank": adapter.config.rank,
                "lora_alpha": adapter.config.alpha,
                "weight": None if inputs.given_weights is None else inputs.given_weights[number],
                "effective_weight": effective,
            }
            for number, (folder, (adapter, effective)) in enumerate(
                zip(inputs.folders, merged.parts, strict=True)
            )
        ],
        "relative_error": merged.relative_error,
        "relative_rounding_error": merged.relative_rounding_error,
        "modules": [error.as_json() for error in merged.errors],
        "notes": [*inputs.notes, *merged.notes],
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_adapter(merged: MergedAdapter, folder: Path, facts: dict[str, Any]) -> None:
    config = {**merged.config, "inference_mode": True}
    durable.write_json(folder / adapter_file.CONFIG_NAME, config)
    adapter_file.write_tensors(folder / adapter_file.WEIGHTS_NAME, merged.adapter.arrays())
    error = merged.relative_error
    card = CARD.format(
        base=config.get("base_model_name_or_path") or "unknown",
        number=len(merged.parts),
        mode=merged.mode,
        meaning=MODES[merged.mode],
        rows="\n".join(
            f"| {Path(entry['path']).name} | {entry['effective_weight']:g} |" for entry in facts["inputs"]
        ),
        error="undefined, the exact sum being zero" if error is None else f"{error:.3g}",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    first = merged.parts[0][0].folder
    if first is not None:
        for name in TOKENIZER_FILES:
            copy_file(first, name, folder)


def _sync(staged: Path) -> None:
    """Everything durable, folders last."""
    paths = sorted(staged.rglob("*"))
    for path in [p for p in paths if p.is_file()] + [p for p in paths if p.is_dir()] + [staged]:
        durable.sync(path)
