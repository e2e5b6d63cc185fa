"""Fisher information of paused participants: of what they train, and nothing of the training changes."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from toolkit.config.recipes import CentralizedConfig
from toolkit.data.collate import Collator
from toolkit.errors import DataError
from toolkit.merging.fisher import estimate_fisher
from toolkit.modeling.adapters import add_adapter
from toolkit.rounds.merging import participant_fisher
from toolkit.training.contract import TrainerSetup, find_backend

LORA = {"finetuning": "lora", "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.1}


def rows(number=12, *, is_causal=False):
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in range(number):
        ids = torch.randint(5, 40, (4 + n % 5,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": ids if is_causal else n % 3, "length": len(ids)})
    return datasets.Dataset.from_list(made)


@pytest.fixture
def classifier(tiny_model):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3, pad_token_id=0)


@pytest.fixture
def trainer_of(tmp_path, tiny_model):
    """A started trainer: trainer_of(model, name, adapter, **options)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainers = []

    def build(model, name="en-US", adapter=None, **given):
        options = {"task": "sequence-classification", "max_epochs": 2, "batch_size": 4, **given}
        options.setdefault("finetuning", "full")
        config = CentralizedConfig(
            model="tiny",
            data="rows",
            output_dir=tmp_path,
            learning_rate=1e-2,
            gradient_checkpointing=False,
            **options,
        )
        if adapter is not None:
            model = add_adapter(model, config, name=adapter)
        setup = TrainerSetup(
            name=name,
            model=model,
            adapter=adapter,
            tokenizer=tokenizer,
            train=rows(is_causal=config.task == "causal-lm"),
            evaluation=None,
            collator=Collator(0, config.task),
            config=config,
            seed=7,
            world={"use_cpu": True, "bf16": False},
            staging=tmp_path / f"staging-{name}",
            on_step=lambda step: None,
        )
        trainer = find_backend("hf").build_trainer(setup)
        trainer.start()
        trainers.append(trainer)
        return SimpleNamespace(trainer=trainer, model=model)

    yield build
    for trainer in trainers:
        trainer.close()


def fisher_of(trainer, data, **given):
    return participant_fisher(trainer, data, **{"num_examples": 6, "batch_size": 2, "seed": 3, **given})


def test_it_has_the_names_of_the_state_and_the_values_of_the_estimate(classifier, trainer_of):
    trainer = trainer_of(classifier).trainer
    trainer.fit(2)
    fisher = fisher_of(trainer, rows())
    state = trainer.state()
    assert fisher.keys() <= state.keys()
    assert all(fisher[name].shape == state[name].shape for name in fisher)
    expected = estimate_fisher(
        classifier, rows(), task="sequence-classification", num_examples=6, batch_size=2, seed=3
    ).tensors
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)
    assert any(bool(tensor.any()) for tensor in fisher.values())


def test_language_models_are_recognised_by_their_labels(tiny_model, trainer_of):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trainer = trainer_of(model, task="causal-lm").trainer
    data = rows(is_causal=True)
    fisher = fisher_of(trainer, data)
    expected = estimate_fisher(model, data, task="causal-lm", num_examples=6, batch_size=2, seed=3).tensors
    assert all(torch.equal(fisher[name], expected[name]) for name in expected)


def test_of_adapters_on_one_base_it_is_the_participants_own(classifier, trainer_of):
    first = trainer_of(classifier, "en-US", "en-US", **LORA)
    second = trainer_of(first.model, "fr-FR", "fr-FR", **LORA)
    first.trainer.fit(2)  # the other one has not moved
    fishers = [fisher_of(entry.trainer, rows()) for entry in (first, second)]
    for fisher, entry in zip(fishers, (first, second), strict=True):
        assert fisher.keys() == entry.trainer.state().keys()
    name = next(name for name in fishers[0] if name.endswith("lora_A.weight"))
    assert bool(fishers[0][name].any())
    assert not bool(fishers[1][name].any())  # its B is zero, so that A has no gradient


def test_training_goes_on_as_if_nothing_had_been_estimated(tiny_model, trainer_of):
    states = []
    for estimates in (False, True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3, pad_token_id=0)
        trainer = trainer_of(model, f"en-{estimates}", "a", **LORA).trainer
        for step in (1, 2, 4):
            trainer.fit(step)
            if estimates:
                fisher_of(trainer, rows())
        states.append(trainer.state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_rows(classifier, trainer_of):
    with pytest.raises(DataError, match="en-US: there are no rows"):
        fisher_of(trainer_of(classifier).trainer, [])
