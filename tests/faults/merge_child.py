"""A process that merges folders, and can be killed at its n-th file operation.

    python merge_child.py OUT MODEL... [--kill N] [--method linear|fisher|tensor] [--options JSON]

Prints ``OPERATIONS n`` at its end. File operations are those that change what a later process finds: making, renaming
and removing files, allocating, writing and syncing. The process ends with SIGKILL before operation N is done.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.errors import MeldkitError
from toolkit.merging.group import FisherTensor, MemoryReader, Reader
from toolkit.merging.plan import InputModel, MergePlan, OutputTensor
from toolkit.merging.registry import REQUIRED, MergeMethod, Parameter
from toolkit.merging.streaming.engine import EngineOptions, execute
from toolkit.merging.streaming.folder_source import FolderSource
from toolkit_kernels.rules import FisherMean, WeightedSum
from toolkit_kernels.spans import Span

AUDITED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}
CALLED = ("pwrite", "write", "fsync", "posix_fallocate")


def linear(group, weight):
    return WeightedSum(weight / weight.sum())


def fisher(group, weight):
    return FisherMean(weight, np.zeros(len(weight)), weight / weight.sum())


def tensor(group, weight):
    """The merged tensor itself, as methods give it that need matrices."""
    models, _ = group.tensors()
    return sum(float(w) * model for w, model in zip(weight / weight.sum(), models, strict=True))


METHODS = {"linear": linear, "fisher": fisher, "tensor": tensor}


def plan_of(folders: list[Path], name: str = "linear") -> MergePlan:
    sources = [FolderSource(folder.name, folder) for folder in folders]
    weight = Parameter("weight", float, REQUIRED, per_model=True)
    method = MergeMethod(name, METHODS[name], "", "", "none", False, (1, None), (weight,), False)
    parameters = {"weight": np.arange(1.0, len(sources) + 1)}
    tensors = []
    for tensor_name in sources[0].names():
        readers = tuple(source.reader(tensor_name) for source in sources)
        importance: tuple[FisherTensor, ...] = ()
        if name == "fisher":  # any non-negative elements will do
            importance = tuple(FisherTensor(squared(reader), 1.0, 1.0, 1.0) for reader in readers)
        tensors.append(
            OutputTensor(
                tensor_name,
                readers[0].shape,
                readers[0].dtype,
                readers,
                fisher=importance,
                method=method,
                parameters=parameters,
            )
        )
    inputs = [InputModel(source.label, "model", source.files) for source in sources]

    def write_companions(staged: Path) -> None:
        (staged / "config.json").write_text("{}")

    return MergePlan(tensors, inputs, name, 0, {}, [], write_companions)


def squared(reader: Reader) -> MemoryReader:
    values = np.asarray(reader.span(0, int(np.prod(reader.shape))).data, np.float32) ** 2
    return MemoryReader(Span.of(values), reader.shape, "float32", f"the Fisher of {reader.where}")


def count_operations(folder: str, kill_at: int) -> list[int]:
    """Count operations; the one with the number ``kill_at`` is not done any more."""
    count, lock = [0], threading.Lock()

    def operation() -> None:
        with lock:
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in AUDITED and isinstance(arguments[0], str | os.PathLike) and folder in str(arguments[0]):
            is_read = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if not is_read:
                operation()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(descriptor: int, *arguments: Any) -> Any:
            if folder in os.readlink(f"/proc/self/fd/{descriptor}"):
                operation()
            return call(descriptor, *arguments)

        return wrapper

    for name in CALLED:
        setattr(os, name, counted(getattr(os, name)))
    sys.addaudithook(hook)
    return count


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--kill", type=int, default=-1)
    parser.add_argument("--method", choices=METHODS, default="linear")
    parser.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    count = count_operations(str(arguments.out.parent), arguments.kill)
    try:
        plan = plan_of(arguments.models, arguments.method)
        report = execute(plan, arguments.out, EngineOptions(**arguments.options))
    except MeldkitError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error.exit_status
    print(f"OPERATIONS {count[0]}\nRESUMED {report.resumed} {report.notes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
