"""Sums of squared per-example gradients: F += Σ_b g_b², the arithmetic of the estimator.

Shapes: B examples, T tokens (or calls times tokens), O outputs, I inputs, S lookups, V rows of an embedding, D width.
Fisher buffers are float32; gradients and activations may be of a lower precision.
"""

from dataclasses import dataclass

import torch

from toolkit.dependencies import is_installed
from toolkit.merging.fisher import compiled

IS_COMPILED = is_installed("numba")
BLOCK_NUM_ELEMENTS = 1 << 20
"""Elements of one example's gradient that are made at a time (4 MiB): the block is squared while it is in the cache."""
DEVICE_NUM_ELEMENTS = 1 << 26
"""The same on an accelerator, for all examples of a batch together (256 MiB)."""


@dataclass(frozen=True, slots=True)
class Products:
    """Gradient of a matrix that multiplies tokens: g_b = Σ_t grad_bt ⊗ input_bt.

    Attributes:
        grad_BTO: gradient with respect to the product.
        input_BTI: what was multiplied.
        is_transposed: the two have changed places (the matrix is held as [I, O]).
    """

    grad_BTO: torch.Tensor
    input_BTI: torch.Tensor
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class Lookups:
    """Gradient of a matrix whose rows are looked up: row v of g_b is Σ_{s: id_bs = v} grad_bs.

    Attributes:
        ids_BS: row numbers, int64; -1 where no gradient belongs to a row (padding_idx).
        grad_BSD: gradient with respect to the rows.
    """

    ids_BS: torch.Tensor
    grad_BSD: torch.Tensor


class Scratch:
    """One reusable float32 buffer: fresh memory would cost more in page faults than the arithmetic in it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, num_elements: int, device: torch.device) -> torch.Tensor:
        if self._buffer.numel() < num_elements or self._buffer.device != device:
            self._buffer = torch.empty(num_elements, dtype=torch.float32, device=device)
        return self._buffer[:num_elements]


def add_vector_squares(fisher_D: torch.Tensor, gradients_BTD: torch.Tensor) -> None:
    """F += Σ_b (Σ_t g_bt)² of a bias or the scale of a norm."""
    gradients_BD = gradients_BTD.sum(dim=1, dtype=torch.float32)
    fisher_D.add_(gradients_BD.square_().sum(dim=0))


def add_lookup_squares(fisher_VD: torch.Tensor, lookups: Lookups) -> None:
    """F += Σ_b g_b² of an embedding. Touches only the rows that occur."""
    occurs_BS = lookups.ids_BS >= 0
    example_BS = torch.arange(len(occurs_BS), device=occurs_BS.device)[:, None].expand_as(occurs_BS)
    num_rows = len(fisher_VD)
    keys, inverse = torch.unique(
        example_BS[occurs_BS] * num_rows + lookups.ids_BS[occurs_BS], return_inverse=True
    )
    sums = fisher_VD.new_zeros(len(keys), fisher_VD.shape[1])
    sums.index_add_(0, inverse, lookups.grad_BSD[occurs_BS].float())
    fisher_VD.index_add_(0, keys % num_rows, sums.square_())


def add_product_squares(
    fisher_OI: torch.Tensor, products: Products, scratch: Scratch, lookups: Lookups | None = None
) -> None:
    """F += Σ_b (Σ_t grad_bt ⊗ input_bt)², exactly; no gradient of a whole batch is ever squared.

    With one token an example the square of a rank-one matrix is (grad²)ᵀ(input²), one product for the whole batch.
    With more, one example's gradient is made block by block and squared while it is in the cache. (The expansion of
    the square over pairs of tokens would cost T(T+1)/2 products and cancel.)

    Args:
        fisher_OI: float32, changed in place.
        products: of every call of the parameter in this forward pass, joined along T.
        scratch: reused.
        lookups: of the same parameter used as an embedding too (tied weights): one sum before the square.
    """
    if lookups is None:
        _add_products(fisher_OI, products, scratch)
        return
    # The rows that are looked up are few. They get both parts, and what the products alone would give them is undone.
    rows = torch.unique(lookups.ids_BS[lookups.ids_BS >= 0])
    sums_UI = fisher_OI[rows]
    _add_products(fisher_OI, products, scratch)
    grad_BTU = products.grad_BTO[:, :, rows].float()
    for b, ids_S in enumerate(lookups.ids_BS):
        gradient_UI = grad_BTU[b].T @ products.input_BTI[b].float()
        occurs_S = ids_S >= 0
        gradient_UI.index_add_(
            0, torch.searchsorted(rows, ids_S[occurs_S]), lookups.grad_BSD[b][occurs_S].float()
        )
        sums_UI.addcmul_(gradient_UI, gradient_UI)
    fisher_OI[rows] = sums_UI


def _add_products(fisher_OI: torch.Tensor, products: Products, scratch: Scratch) -> None:
    """The one place where the bulk of the arithmetic is done."""
    grad_BTO, input_BTI = products.grad_BTO, products.input_BTI
    if fisher_OI.device.type != "cpu":
        _add_in_batches(fisher_OI, products, scratch)
        return
    spans = _spans(products)
    if max(stop - start for start, stop in spans) <= 1:
        chosen = [(b, start) for b, (start, stop) in enumerate(spans) if stop > start]
        if chosen:
            b, t = (torch.tensor(index) for index in zip(*chosen, strict=True))
            fisher_OI.addmm_(grad_BTO[b, t].float().square_().T, input_BTI[b, t].float().square_())
        return
    num_done = compiled.add_product_squares(fisher_OI, grad_BTO, input_BTI, spans) if IS_COMPILED else 0
    if num_done < len(fisher_OI):
        rest = Products(grad_BTO[:, :, num_done:], input_BTI)
        _add_by_blocks(fisher_OI[num_done:], rest, spans, scratch)


def _add_by_blocks(
    fisher_OI: torch.Tensor, products: Products, spans: list[tuple[int, int]], scratch: Scratch
) -> None:
    """Where nothing can be compiled."""
    num_outputs, num_inputs = fisher_OI.shape
    block = max(1, min(num_outputs, BLOCK_NUM_ELEMENTS // num_inputs))
    buffer = scratch.take(block * num_inputs, fisher_OI.device)
    grads_OT = products.grad_BTO.float().transpose(1, 2).unbind()
    inputs_TI = products.input_BTI.float().unbind()
    examples = [
        (grad_OT[:, slice(*span)], input_TI[slice(*span)])
        for grad_OT, input_TI, span in zip(grads_OT, inputs_TI, spans, strict=True)
    ]
    for first in range(0, num_outputs, block):
        fisher_block = fisher_OI[first : first + block]
        gradient = buffer[: fisher_block.numel()].view_as(fisher_block)
        for grad_OT, input_TI in examples:
            torch.mm(grad_OT[first : first + block], input_TI, out=gradient)
            fisher_block.addcmul_(gradient, gradient)


def _spans(products: Products) -> list[tuple[int, int]]:
    """Of each example the tokens outside of which the product is zero: padding, a prompt, all but the first token."""
    gradient = products.input_BTI if products.is_transposed else products.grad_BTO
    num_examples, num_tokens, _ = gradient.shape
    # Two tokens tell at once that nothing is to be gained, which is the usual case.
    if num_tokens == 1 or bool((gradient[:, 0 :: num_tokens - 1] != 0).any(dim=-1).all()):
        return [(0, num_tokens)] * num_examples
    spans = []
    for used in (gradient != 0).any(dim=-1).tolist():
        start = used.index(True) if True in used else num_tokens
        spans.append((start, num_tokens - used[::-1].index(True) if True in used else start))
    return spans


def _add_in_batches(fisher_OI: torch.Tensor, products: Products, scratch: Scratch) -> None:
    """The same on an accelerator: no transfer to decide anything, few and large launches."""
    grad_BTO, input_BTI = products.grad_BTO, products.input_BTI
    num_examples, num_tokens, num_outputs = grad_BTO.shape
    num_inputs = input_BTI.shape[-1]
    if num_tokens == 1:
        fisher_OI.addmm_(grad_BTO[:, 0].float().square().T, input_BTI[:, 0].float().square())
        return
    low = grad_BTO.dtype in (torch.bfloat16, torch.float16) and grad_BTO.dtype == input_BTI.dtype
    if not (low and grad_BTO.is_cuda):
        grad_BTO, input_BTI = grad_BTO.float(), input_BTI.float()
    block = max(1, min(num_outputs, DEVICE_NUM_ELEMENTS // (num_examples * num_inputs)))
    buffer = scratch.take(num_examples * block * num_inputs, fisher_OI.device)
    for first in range(0, num_outputs, block):
        fisher_block = fisher_OI[first : first + block]
        gradients = buffer[: num_examples * fisher_block.numel()].view(num_examples, *fisher_block.shape)
        grad_BRT = grad_BTO[:, :, first : first + block].transpose(1, 2)
        if grad_BTO.dtype == torch.float32:
            torch.bmm(grad_BRT, input_BTI, out=gradients)
        else:  # low-precision factors, products accumulated and kept in float32
            torch.bmm(grad_BRT, input_BTI, out_dtype=torch.float32, out=gradients)
        fisher_block.add_(gradients.square_().sum(dim=0))
