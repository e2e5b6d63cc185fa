"""Attention for rows that lie one after the other in one sequence: each row by itself, without a mask.

transformers masks such a sequence of S positions: all S² pairs are computed and most thrown away. Here the rows are
padded to the longest of them for attention alone, and go through torch's scaled_dot_product_attention as a batch: with
a causal mask no position looks at the padding behind it. Everything else of the model computes no padding.

It is registered with transformers under a name of its own; wherever it is not told the rows (evaluation, generation),
it is transformers' ``sdpa``.

R rows, T the longest of them, S positions of all, A heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "meldkit_rows"


class Rows:
    """Where the rows of a sequence lie in it and in a padded batch.

    Args:
        lengths: of the R rows, S in all.
        device: of the model.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.num_rows, self.longest = len(lengths), max(lengths)
        places = [torch.arange(length) + row * self.longest for row, length in enumerate(lengths)]
        self._places_S = torch.cat(places).to(device, non_blocking=True)

    def pad(self, states_1ASD: torch.Tensor) -> torch.Tensor:
        """[1, A, S, D] → [R, A, T, D], zeros behind each row."""
        _, num_heads, _, size = states_1ASD.shape
        padded = states_1ASD.new_zeros(self.num_rows * self.longest, num_heads, size)
        padded = padded.index_copy(0, self._places_S, states_1ASD[0].transpose(0, 1))
        return padded.view(self.num_rows, self.longest, num_heads, size).transpose(1, 2)

    def join(self, states_RTAD: torch.Tensor) -> torch.Tensor:
        """[R, T, A, D] → [1, S, A, D]."""
        return states_RTAD.flatten(0, 1).index_select(0, self._places_S)[None]


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rows: Rows | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' attention functions have it.

    Args:
        query: [1, A, S, D]; key and value with their own number of heads.
        attention_mask: used where the rows are not told, or a layer looks at a window shorter than a row.
        rows: of the sequence.
        options: of ``sdpa_attention_forward``.

    Returns:
        [1, S, A, D], and no weights.
    """
    window = options.get("sliding_window")
    is_windowed = rows is not None and window is not None and window < rows.longest
    if rows is None or is_windowed or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    padded = sdpa_attention_forward(module, rows.pad(query), rows.pad(key), rows.pad(value), None, **options)
    return rows.join(padded[0]), None


AttentionInterface.register(NAME, row_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_row_attention(model: Any) -> bool:
    """Switch a transformers model that uses ``sdpa`` over to it; whether that could be done."""
    if model.config._attn_implementation == NAME:
        return True
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(NAME)
    return True
