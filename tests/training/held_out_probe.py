"""Evaluate held-out rows as one of several processes: ``held_out_probe.py RANK WORLD FOLDER``."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from conftest import ragged_rows, tiny_encoder, tiny_llama

from toolkit.data.collate import Collator
from toolkit.evaluation.held_out import evaluate_rows


def main(rank: int, world: int, folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in place.items()})  # accelerate reads them
    os.environ.update(MASTER_ADDR="unused", MASTER_PORT="0")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    accelerator = Accelerator(cpu=True)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, world)
    for task, model, rows in (
        ("causal-lm", tiny_llama(), ragged_rows(7)),
        ("sequence-classification", tiny_encoder(), ragged_rows(7, num_classes=5)),
    ):
        collator = Collator(0, task)
        found = evaluate_rows(model, rows, collator, task=task, batch_size=3, accelerator=accelerator)
        kept = {"loss": found.loss, "weight": found.weight}
        if found.expected is not None:
            kept |= {"expected": found.expected, "predicted": found.predicted}
        np.savez(folder / f"{task}-{rank}.npz", **kept)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
