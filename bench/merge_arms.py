"""What bench/merge.py times in a fresh process: one merge by meldkit, by mergekit, or the mere reading and writing.

    PYTHON bench/merge_arms.py meldkit|mergekit|copy CONFIG.yml OUT [--threads N]

Prints one line of JSON: seconds from the first look at the configuration to the last byte of the output. Imports do not
count, nor does syncing the output to the disk, which mergekit does not do. The mergekit arm runs under the interpreter
of mergekit's own environment and imports nothing of meldkit.
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

PIECE_BYTES = 1 << 20


def meldkit(config: Path, out: Path, threads: int) -> dict:
    from dataclasses import asdict

    from toolkit.merging.folders import merge_folders
    from toolkit.merging.streaming.engine import EngineOptions
    from toolkit_kernels.dispatch import backend

    kernels = backend("auto")
    load(kernels)
    began = time.perf_counter()
    options = EngineOptions(num_threads=threads, hash_inputs=False)
    report = merge_folders(config, out, engine_options=options)
    total = time.perf_counter() - began
    return {
        "seconds": total - report.seconds.syncing,
        "with_fsync": total,
        "backend": kernels.name,
        "parts": asdict(report.seconds),
    }


def load(kernels: Any) -> None:
    """Let the backend load its machine code: the counterpart of mergekit's import of torch."""
    import numpy as np

    from toolkit_kernels.rules import Consensus, Inputs, Keep, Piece, Threshold, WeightedSum
    from toolkit_kernels.spans import Span

    values = Span(np.zeros(8, np.uint16), "bfloat16")
    inputs, weights = Inputs((values, values), values), np.ones(2)
    keep = (Keep(among=Threshold(0, 0)), Keep(probability=0.5))
    for rule in (WeightedSum(weights), Consensus(weights, keep, True, True, 1.0)):
        kernels.apply([Piece(inputs, rule, Span(np.zeros(8, np.uint16), "bfloat16"))])
    kernels.gram(inputs)
    kernels.histogram(inputs, None)
    kernels.histogram(inputs, [0, 0])
    kernels.sift(inputs, [(0, 1)] * 2, 1)
    kernels.nth_equal(inputs, 0, 0, 1)
    kernels.non_finite(inputs)


def mergekit(config: Path, out: Path, threads: int) -> dict:
    import torch
    import yaml

    # Installed in an environment of its own (bench/mergekit_env.sh).
    from mergekit.config import MergeConfiguration  # pyright: ignore[reportMissingImports] - see above
    from mergekit.merge import MergeOptions, run_merge  # pyright: ignore[reportMissingImports] - see above

    torch.set_num_threads(threads)
    began = time.perf_counter()
    merge_config = MergeConfiguration.model_validate(yaml.safe_load(config.read_text(encoding="utf-8")))
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, random_seed=0, quiet=True)
    run_merge(merge_config, str(out), options)
    return {"seconds": time.perf_counter() - began}


def copy(config: Path, out: Path, threads: int) -> dict:
    """Read every input once into a buffer that is used again, write as many bytes as one model has."""
    import yaml

    recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
    folders = {Path(entry["model"]) for entry in recipe["models"]}
    folders |= {Path(recipe["base_model"])} if "base_model" in recipe else set()
    files = [path for folder in sorted(folders) for path in sorted(folder.glob("*.safetensors"))]
    num_bytes = max(sum(p.stat().st_size for p in folder.glob("*.safetensors")) for folder in folders)
    out.mkdir()
    began = time.perf_counter()
    target = os.open(out / "model.safetensors", os.O_RDWR | os.O_CREAT, 0o644)
    os.posix_fallocate(target, 0, num_bytes)
    sources = [(os.open(path, os.O_RDONLY), path.stat().st_size) for path in files]

    def work(thread: int) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for descriptor, size in sources:
            for start in range(thread * PIECE_BYTES, size, threads * PIECE_BYTES):
                os.preadv(descriptor, [buffer], start)
        for start in range(thread * PIECE_BYTES, num_bytes, threads * PIECE_BYTES):
            os.pwrite(target, buffer[: num_bytes - start], start)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=["meldkit", "mergekit", "copy"])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    arm = {"meldkit": meldkit, "mergekit": mergekit, "copy": copy}[arguments.arm]
    print(json.dumps(arm(arguments.config, arguments.out, arguments.threads)))


if __name__ == "__main__":
    main()
