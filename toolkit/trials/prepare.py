"""Before the trials, in a process of its own: the rows that all arms train, as a file, and what is in them.

``python -m toolkit.trials.prepare SPEC.json`` writes ``rows.jsonl``, ``probe_rows.json`` and
``workload.json`` into the folder of the specification. A benchmark that goes on finds them there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.cli.failures import guarded
from toolkit.durable import file_sha256, write_json, write_text
from toolkit.errors import DataError
from toolkit.trials.meldkit import config_of

NUM_PROBE_ROWS = 16


def prepare_workload(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Draw the rows by the seed, write them, and describe them as they are trained."""
    from toolkit.data.prepare import prepare
    from toolkit.data.selection import select_tables
    from toolkit.data.tokenizer import load_tokenizer
    from toolkit.modeling.load import load_model_config
    from toolkit.modeling.source import find_model, model_fingerprint

    config = config_of(settings | {"max_rows": None}, {}, folder / "none")
    table, held_out = select_tables(config)
    drawn = np.random.default_rng(config.seed).permutation(len(table))[: settings["max_rows"]]
    _write_rows(folder / "rows.jsonl", [table.rows[int(index)] for index in drawn])
    update: dict[str, Any] = {"data": str(folder / "rows.jsonl"), "eval_data": None}
    if held_out is not None:
        _write_rows(folder / "held_out.jsonl", held_out.rows[:NUM_PROBE_ROWS])
        update["eval_data"] = str(folder / "held_out.jsonl")
    config = config.model_copy(update=update | {"packing": False, "train_split": "train", "eval_split": None})
    model_config = load_model_config(config)
    prepared = prepare(config, load_tokenizer(config), config.task, seed=config.seed, use_cache=False)
    probe_rows = prepared.train if prepared.evaluation is None else prepared.evaluation
    chosen = probe_rows.select(range(min(NUM_PROBE_ROWS, len(probe_rows))))
    write_json(
        folder / "probe_rows.json",
        [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in chosen],
    )
    lengths = [int(length) for length in prepared.train["length"]]
    return {
        "num_rows": len(lengths),
        "num_tokens": sum(lengths),
        "mean_row_tokens": sum(lengths) / len(lengths),
        "longest_row_tokens": max(lengths),
        "row_tokens_quantiles": [float(q) for q in np.quantile(lengths, (0.05, 0.25, 0.5, 0.75, 0.95))],
        "data_sha256": file_sha256(folder / "rows.jsonl"),
        "data_fingerprint": prepared.fingerprint,
        "model_fingerprint": model_fingerprint(
            find_model(config.model), config.revision, getattr(model_config, "_commit_hash", None)
        ),
        "loss_is_of": "held-out rows" if prepared.evaluation is not None else "training rows",
    }


def _write_rows(path: Path, rows: Any) -> None:
    if not rows:
        raise DataError("there are no rows to train")
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def main(path: str) -> int:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    folder = Path(spec["folder"])

    def run() -> int:
        write_json(folder / "workload.json", prepare_workload(spec["settings"], folder))
        return 0

    return guarded(run, debug=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
