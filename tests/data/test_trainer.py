"""Prepared rows and the collator under TRL's and transformers' trainers, for a step or two."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from toolkit.data.collate import Collator
from toolkit.data.prepare import prepare


@pytest.fixture
def arguments(tmp_path):
    def make(config_class=SFTConfig, **values):
        common = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        if config_class is SFTConfig:
            common |= {
                "dataset_kwargs": {"skip_prepare_dataset": True},
                "bf16": False,
                "gradient_checkpointing": False,
                "max_length": None,
            }
        return config_class(**{**common, **values})

    return make


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("keeps_columns", [True, False])
def test_sft_trainer_trains_on_exactly_the_prepared_rows(
    options, write_jsonl, make_chat, tokenizer, tiny_llama, arguments, packing, keeps_columns
):
    data = write_jsonl([make_chat(f"question {n}", "word " * (n + 1)) for n in range(12)])
    config = options(data=data, eval_fraction=0.2, packing=packing, max_length=128)
    prepared = prepare(config, tokenizer, "causal-lm", seed=0)
    seen = []

    class Watching(Collator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            seen.append(batch)
            return batch

    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    trainer = SFTTrainer(
        model=tiny_llama,
        args=arguments(remove_unused_columns=not keeps_columns),
        train_dataset=prepared.train,
        eval_dataset=prepared.evaluation,
        data_collator=Watching(tokenizer.pad_token_id, packing=packing),
        processing_class=tokenizer,
    )
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert any(not torch.equal(before[name], value) for name, value in tiny_llama.state_dict().items())
    for batch in seen:
        assert ("position_ids" in batch) == packing
        assert ("attention_mask" in batch) != packing
        assert (batch["labels"] != -100).sum() > 0
    metrics = trainer.evaluate()
    with torch.no_grad():
        tiny_llama.eval()
        batch = Collator(tokenizer.pad_token_id)(list(prepared.evaluation))
        expected = tiny_llama(**batch, use_cache=False).loss
    assert abs(metrics["eval_loss"] - expected) < 5e-3


def test_length_groups_come_from_the_length_column(
    options, write_jsonl, make_chat, tokenizer, tiny_llama, arguments
):
    data = write_jsonl([make_chat(f"question {n}", "word " * (n * 7 % 40 + 1)) for n in range(160)])
    prepared = prepare(options(data=data), tokenizer, "causal-lm", seed=0)
    spreads = {}
    for strategy in ("random", "group_by_length"):
        trainer = SFTTrainer(
            model=tiny_llama,
            args=arguments(train_sampling_strategy=strategy, per_device_train_batch_size=4),
            train_dataset=prepared.train,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
        )
        widths = [batch["attention_mask"].sum(1) for batch in trainer.get_train_dataloader()]
        spreads[strategy] = sum(int(width.max() - width.min()) for width in widths)
        if strategy == "group_by_length":
            assert list(trainer._get_train_sampler().lengths) == list(prepared.train["length"])
    assert spreads["group_by_length"] < 0.3 * spreads["random"]


def test_classification_steps(options, write_jsonl, tokenizer, arguments):
    rows = [{"utt": f"word {n}", "intent": ["on", "off", "dim"][n % 3]} for n in range(12)]
    prepared = prepare(
        options(data=write_jsonl(rows), eval_fraction=0.25), tokenizer, "sequence-classification", seed=0
    )
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=512, num_labels=len(prepared.label_names), **small)
    )
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments),
        train_dataset=prepared.train,
        eval_dataset=prepared.evaluation,
        data_collator=Collator(tokenizer.pad_token_id, "sequence-classification"),
    )
    assert trainer.train().global_step == 2
    assert trainer.evaluate()["eval_loss"] > 0
