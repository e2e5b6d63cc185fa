"""What a model does with a few tokens: tried on the model itself, so that no list of model families is needed."""

import re
from contextlib import AbstractContextManager
from typing import Any

import torch

from toolkit.training.fused_loss import fused_loss, head_of
from toolkit.training.row_attention import Rows

_OF_ADAPTERS = re.compile(r"\.(lora_\w+|modules_to_save)\.")
NUM_TOKENS = 24
"""Of a tried row: more than the window that a convolution or a state would carry over a border."""
SAME_SHARE = 0.05
"""Root mean square of a difference of logits, as a share of their standard deviation, that is rounding. 16-bit
products differ by 1 to 2 % between layouts; rows that see each other differ by 50 % and more."""
SAME_LOSS = 0.01
"""Relative difference of two losses that is rounding."""


def rows_stay_apart(model: Any, autocast: AbstractContextManager[Any], *, tells_rows: bool) -> bool:
    """Whether two rows in one sequence, told apart by ``position_ids``, get the logits of each by itself.

    Args:
        model: a causal language model, whole in this process.
        tells_rows: its attention is told the rows too.
        autocast: the context in which it trains.
    """
    rows = [_tokens(model, seed) for seed in (1, 2)]
    positions = torch.arange(NUM_TOKENS, device=rows[0].device).repeat(2)[None]
    told = {"rows": Rows((NUM_TOKENS, NUM_TOKENS), positions.device)} if tells_rows else {}
    with _untouched(model), torch.no_grad(), autocast:
        joined = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **told)
        together = joined.logits[0].float()
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows]).float()
    return float((together - alone).square().mean().sqrt()) <= SAME_SHARE * float(alone.std())


def fused_loss_agrees(model: Any, autocast: AbstractContextManager[Any]) -> bool:
    """Whether :func:`~toolkit.training.fused_loss.fused_loss` gives the model's own loss: it does not where logits are
    scaled or capped, or a loss of the routers is added."""
    if head_of(model) is None:
        return False
    ids = _tokens(model, 3)[None]
    with _untouched(model), torch.no_grad(), autocast:
        own = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        ours = float(fused_loss(model, {"input_ids": ids, "labels": ids}, None))
    return abs(own - ours) <= SAME_LOSS * abs(own)


def activation_bytes_per_token(model: Any, autocast: AbstractContextManager[Any]) -> float:
    """Bytes that the forward pass keeps for the backward pass, for each token; what it keeps for any number of tokens
    (weights, cast to 16 bits) is left out."""
    few, many = (_kept_bytes(model, autocast, num_tokens) for num_tokens in (NUM_TOKENS, 2 * NUM_TOKENS))
    return (many - few) / NUM_TOKENS


def _kept_bytes(model: Any, autocast: AbstractContextManager[Any], num_tokens: int) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.cat([_tokens(model, 4)] * (num_tokens // NUM_TOKENS))[None]
    with _untouched(model), torch.enable_grad(), autocast, torch.random.fork_rng():
        model.train()  # for dropout, which keeps its masks
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=ids, use_cache=False).logits
    del logits  # until here the graph has held what it keeps, so that no two of them have one address
    return sum(kept.values())


class _untouched:
    """Evaluation inside, and the model's own mode again behind it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._was_training = model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: Any) -> None:
        self._model.train(self._was_training)


def _tokens(model: Any, seed: int) -> torch.Tensor:
    """[NUM_TOKENS] token ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings()
    ids = torch.randint(embeddings.num_embeddings, (NUM_TOKENS,), generator=generator)
    return ids.to(embeddings.weight.device)


def pair_cost(model: Any) -> float:
    """Attention between two positions in tokens' worth of matrix products: 12 L H Q over 4 operations a frozen weight
    (A. Chowdhery et al., PaLM, arXiv:2204.02311, appendix B).

    Adapters do not count: which ones of other participants lie on the base must not change how rows are laid out.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    weights = (p.numel() for name, p in model.named_parameters() if not _OF_ADAPTERS.search(name))
    return 12 * config.num_hidden_layers * width / max(4 * sum(weights), 1)
