"""A plan as text: what --dry-run and --verbose print."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.merging.plan import InputModel, MergePlan, OutputTensor, tensor_readers
from toolkit.merging.streaming.layout import lay_out
from toolkit.reporting.wording import size
from toolkit_kernels.pool import num_cores

PROBE_BYTES = 16_000_000
PROBE_ROUNDS = 3
# Share of a copy's bandwidth that a merge from file to file reaches, and seconds to start.
EFFICIENCY = 0.6
START_SECONDS = 0.5
MAX_GROUPS = 16


def plan_text(plan: MergePlan, out: Path, max_shard_bytes: int, num_threads: int | None) -> str:
    """The plan as lines."""
    lines = [f"Method   {plan.method}, seed {plan.seed}", "Inputs"]
    lines += [f"  {line}" for line in _inputs(plan)]
    lines.append("Tensors")
    groups = list(_groups(plan.tensors))
    lines += [f"  {line}" for line in groups[:MAX_GROUPS]]
    if len(groups) > MAX_GROUPS:
        lines.append(f"  ... and {len(groups) - MAX_GROUPS} more groups")
    lines.append(f"Output   {out}")
    layout = lay_out(plan.tensors, max_shard_bytes)
    dtypes = Counter(tensor.dtype for tensor in plan.tensors)
    types = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    files = layout.shards
    names = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} to {files[-1].name}"
    lines.append(f"  {size(plan.bytes_written)} in {len(plan.tensors)} tensors ({types}); {names}")
    lines += [f"Note     {note}" for note in plan.notes]
    lines.append(f"Time     {_seconds(plan, num_threads)}")
    return "\n".join(lines)


def _inputs(plan: MergePlan) -> Iterator[str]:
    rows = [(model.role, model.label, size(_file_bytes(model)), len(model.files)) for model in plan.inputs]
    width = max((len(label) for _, label, _, _ in rows), default=0)
    for role, label, total, count in rows:
        files = "weights are not read" if not count else f"{total} in {count} file{'s' if count > 1 else ''}"
        yield f"{role:<9} {label:<{width}}  {files}"


def _file_bytes(model: InputModel) -> int:
    return sum(path.stat().st_size for path in model.files if path.exists())


def _groups(tensors: list[OutputTensor]) -> Iterator[str]:
    """One line for tensors of the same parameters, models and types."""
    groups: dict[tuple[Any, ...], list[OutputTensor]] = {}
    for tensor in tensors:
        key = (id(tensor.parameters) if tensor.method else 0, tensor.method, len(tensor.models), tensor.dtype)
        groups.setdefault(key, []).append(tensor)
    for members in groups.values():
        first = members[0]
        names = first.name if len(members) == 1 else f"{len(members)} tensors like {first.name}"
        if first.method is None:
            yield f"{names}: copied, {first.dtype}"
            continue
        parameters = ", ".join(
            f"{name.rstrip('_')} {shown(value)}" for name, value in first.parameters.items()
        )
        own_types = sorted({reader.dtype for tensor in members for reader in tensor_readers(tensor)})
        arrow = first.dtype if own_types == [first.dtype] else f"{'+'.join(own_types)} to {first.dtype}"
        yield f"{names}: {first.method.name}; {parameters or 'no parameters'}; {arrow}"


def shown(value: Any) -> str:
    """A parameter's value."""
    if isinstance(value, np.ndarray):
        return "[" + ", ".join(f"{number:g}" for number in value.tolist()) + "]"
    if isinstance(value, Mapping | list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seconds(plan: MergePlan, num_threads: int | None) -> str:
    bandwidth = copy_bandwidth(num_threads or num_cores())
    total = plan.bytes_read + plan.bytes_written
    seconds = START_SECONDS + total / (bandwidth * EFFICIENCY)
    return (
        f"about {seconds:.2g} s with the files in memory: {size(plan.bytes_read)} to read, "
        f"{size(plan.bytes_written)} to write, at {EFFICIENCY:.0%} of the {bandwidth / 1e9:.1f} GB/s of a copy; "
        "longer where a method reads twice or the disk is slower"
    )


def copy_bandwidth(num_threads: int) -> float:
    """Bytes read and written in a second by ``num_threads`` threads that copy memory; takes a few milliseconds."""
    count = max(PROBE_BYTES // num_threads // 4, 1)
    pairs = [(np.ones(count, np.float32), np.ones(count, np.float32)) for _ in range(num_threads)]
    best = float("inf")
    for _ in range(PROBE_ROUNDS):
        threads = [threading.Thread(target=np.copyto, args=pair) for pair in pairs]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - began)
    return 2 * sum(pair[0].nbytes for pair in pairs) / best
