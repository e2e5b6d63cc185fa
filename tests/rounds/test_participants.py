"""Participants and the factory of their trainers."""

import dataclasses
import json

import pytest
import torch
from accelerate import PartialState

from toolkit.config.load import load
from toolkit.config.recipes import IterativeConfig
from toolkit.data.prepare import prepare
from toolkit.data.tokenizer import load_tokenizer
from toolkit.launch.plan import resolve_plan
from toolkit.rounds.participants import Participant, Standing, TrainerFactory, seed_of
from toolkit.training.contract import StepStatistics


def test_seeds_are_a_participants_own_and_stay():
    names = ["en-US", "fr-FR", "de-DE", "sq-AL"]
    seeds = [seed_of(name, seed) for name in names for seed in (0, 1)]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_standing_survives_as_json():
    standing = Standing(
        status="stopped",
        num_merges=2,
        metrics={"loss": 0.5},
        stop_reason="no better for 1 evaluations",
        early_stopping={"best": 1.0},
    )
    assert Standing(**json.loads(json.dumps(standing.as_dict()))) == standing


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps():
    participant = Participant("en-US", None, None, None)  # pyright: ignore[reportArgumentType] - it only counts
    step = StepStatistics(
        **{field.name: 0 for field in dataclasses.fields(StepStatistics)}  # pyright: ignore[reportArgumentType] - only the loss counts
    )
    for loss in (1.0, 2.0, 6.0):
        participant.count_step(dataclasses.replace(step, loss=loss))
    assert participant.end_epoch() == 3.0
    participant.count_step(dataclasses.replace(step, loss=5.0))
    assert participant.end_epoch() == 5.0


@pytest.fixture
def factory_of(tmp_path, tiny_encoder, intent_data):
    """factory_of("--finetuning", "full") → a factory, and build(name) → a trainer that has started."""

    def make(*options: str):
        argv = ["--locales", "en-US,fr-FR", "--cpu", "--model", str(tiny_encoder), "--data", str(intent_data)]
        config = load(IterativeConfig, [*argv, "--max-epochs", "1", "--batch-size", "12", *options]).config
        plan = resolve_plan(config)
        tokenizer = load_tokenizer(config)
        labels = ["intent_0", "intent_1", "intent_2"]
        rows = prepare(
            config.for_locale("en-US"), tokenizer, config.task, seed=config.seed, label_names=labels
        )
        factory = TrainerFactory(config, plan, tokenizer, labels, PartialState(cpu=True))

        def build(name: str, **more):
            staging = tmp_path / name
            trainer = factory.build(
                name, rows, staging, on_step=lambda step: None, stop_requested=lambda: False, **more
            )
            trainer.start()
            return trainer

        return factory, build

    return make


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_adapters_share_one_base_and_begin_alike(factory_of):
    _, build = factory_of()
    first, second = build("en-US"), build("fr-FR")
    assert first.model is second.model
    assert equal(first.state(), second.state())
    before = second.state()
    assert first.fit(2)
    assert not equal(first.state(), before)
    assert equal(second.state(), before)
    third = build("late", adapter="de-DE")  # after another has trained on the base
    assert equal(third.state(), before)
    for trainer in (first, second, third):
        trainer.close()


def test_full_models_are_apart_and_begin_alike(factory_of):
    _, build = factory_of("--finetuning", "full")
    first, second = build("en-US"), build("fr-FR")
    assert first.model is not second.model
    assert equal(first.state(), second.state())
    before = second.state()
    assert first.fit(1)
    assert equal(second.state(), before)
    first.close()
    second.close()


@pytest.mark.parametrize("options", [(), ("--finetuning", "full")], ids=["lora", "full"])
def test_a_name_comes_back_with_the_same_beginning(factory_of, options):
    """Of the only participant too, whose adapter was the base's last one."""
    factory, build = factory_of(*options)
    first = build("en-US")
    before = first.state()
    assert first.fit(2)
    trained = first.state()
    factory.discard(first)
    again = build("en-US")
    assert equal(again.state(), before)
    assert again.fit(2)
    assert equal(again.state(), trained)
    factory.discard(again)
    if not options:
        assert len(factory._shared.peft_config) == 1


def test_the_seed_name_decides_rows_and_dropout(factory_of):
    _, build = factory_of("--lora-dropout", "0.1")
    found = []
    for name, more in (
        ("en-US", {}),
        ("fr-FR", {}),
        ("baselines", {"adapter": "de-DE", "seed_name": "en-US"}),
    ):
        trainer = build(name, **more)
        assert trainer.fit(2)
        found.append(trainer.state())
        trainer.close()
    assert not equal(found[0], found[1])
    assert equal(found[0], found[2])
