"""A tiny real model, real prepared rows, and a configuration object for trainers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def tiny_llama(seed: int = 0, **overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | overrides)))
    model.config.use_cache = False
    return model


def tiny_encoder(seed: int = 0, **overrides):
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    torch.manual_seed(seed)
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**(values | overrides)))


@pytest.fixture
def make_model():
    return tiny_llama


@pytest.fixture
def make_encoder():
    return tiny_encoder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def ragged_rows(number: int, seed: int = 0, *, num_classes: int | None = None):
    """Rows of 6 to 19 token ids. The first third of each is prompt (label -100); with ``num_classes`` the label is a
    class."""
    import datasets

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        length = int(torch.randint(6, 20, (), generator=generator))
        ids = torch.randint(4, 64, (length,), generator=generator).tolist()
        prompt = length // 3
        labels = [-100] * prompt + ids[prompt:] if num_classes is None else sum(ids) % num_classes
        made.append({"input_ids": ids, "labels": labels, "length": length})
    return datasets.Dataset.from_list(made)


@pytest.fixture
def make_rows():
    return ragged_rows


@pytest.fixture
def make_config():
    def config(**overrides):
        from toolkit.config.recipes import CentralizedConfig

        values = {
            "model": "tiny",
            "data": "rows",
            "output_dir": Path("unused"),
            "max_epochs": 3,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
        }
        if overrides.get("finetuning") != "full":
            values |= {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
        return CentralizedConfig(**(values | overrides))

    return config


@pytest.fixture
def build(tmp_path, tiny_tokenizer, make_config, make_rows):
    """Build a participant's trainer: build(name, model, adapter=..., rows=..., **config)."""
    from toolkit.data.collate import Collator
    from toolkit.training.contract import TrainerSetup, find_backend

    def make(
        name,
        model,
        *,
        adapter="default",
        rows=None,
        evaluation=None,
        seed=7,
        world=None,
        stop=lambda: False,
        **overrides,
    ):
        steps: list = []
        config = make_config(**overrides)
        setup = TrainerSetup(
            name=name,
            model=model,
            adapter=adapter,
            tokenizer=tiny_tokenizer,
            train=make_rows(18) if rows is None else rows,
            evaluation=evaluation,
            collator=Collator(0, config.task),
            config=config,
            seed=seed,
            world=world or {"use_cpu": True, "bf16": False},
            staging=tmp_path / f"staging-{name}",
            on_step=steps.append,
            stop_requested=stop,
        )
        return SimpleNamespace(trainer=find_backend("hf").build_trainer(setup), steps=steps)

    return make
