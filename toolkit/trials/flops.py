"""Floating-point operations that training needs, without what is computed a second time."""

from typing import Any


def flops_per_token(model: Any, mean_row_tokens: float) -> float:
    """Operations of forward and backward pass for one token.

    A weight of a matrix product costs 2 operations forward, 2 for the gradient of its input and 2 for its own: 6 where
    it is trained, 4 where it is frozen (the correction of LoRA: (2 + trained / frozen) / 3 of 6). Attention between a
    token and its row costs 12 L H Q T / 2 with a causal mask, T the row's mean length. A look-up in the embeddings
    costs nothing; where they are tied to the head the head's product counts.

    Source: A. Chowdhery et al., PaLM (2022), arXiv:2204.02311, appendix B; J. Kaplan et al. (2020), arXiv:2001.08361.
    """
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    is_tied = head is not None and head.weight is embeddings.weight
    looked_up = set() if is_tied else {id(p) for p in embeddings.parameters()}
    frozen = trained = 0
    for parameter in model.parameters():
        if id(parameter) in looked_up or parameter.dim() < 2:
            continue
        # Weights in 4 bits are stored as bytes of two.
        count = parameter.numel() * (2 if hasattr(parameter, "quant_state") else 1)
        if parameter.requires_grad:
            trained += count
        else:
            frozen += count
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    attention = 12 * config.num_hidden_layers * width * mean_row_tokens / 2
    return 4.0 * frozen + 6.0 * trained + attention
