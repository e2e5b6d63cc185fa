"""What identifies prepared rows: their tokens and labels, however they were made."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa


def rows_sha256(*splits: Any) -> str:
    """SHA-256 over token ids, labels and lengths of prepared splits, in order.

    A resumed run must train on the same rows. A hash of the source files would miss another tokenizer; one of
    the code that prepares them would refuse a run after an upgrade that changes nothing.

    Args:
        splits: ``datasets.Dataset`` with ``input_ids`` and ``labels``, or None.
    """
    hasher = hashlib.sha256()
    for split in splits:
        hasher.update(b"\x00split")
        if split is None:
            continue
        table = split.with_format("arrow")[:]
        for name in ("input_ids", "labels"):
            column = table.column(name).combine_chunks()
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                hasher.update(np.ascontiguousarray(column.value_lengths(), dtype=np.int64).tobytes())
                column = column.flatten()
            hasher.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    return hasher.hexdigest()
