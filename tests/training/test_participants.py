"""Many participants in one process: whatever their turns, each gets the bits of training alone."""

import random
from dataclasses import dataclass

import pytest
import torch

from toolkit.errors import ModelError, NonFiniteLossError
from toolkit.modeling.adapters import add_adapter

NAMES = ("en-US", "en", "fr-FR")  # one is part of another
CLASSES = {"task": "sequence-classification", "learning_rate": 2e-2}
SEEDS = {name: 11 + number for number, name in enumerate(NAMES)}


@dataclass
class Kind:
    """A way of training: how its models are made and what its rows are."""

    model: object
    rows: object
    options: dict

    @property
    def is_full(self):
        return self.options.get("finetuning") == "full"


@pytest.fixture
def kinds(make_model, make_encoder, make_rows):
    def classes(number, seed=0):
        return make_rows(number, seed, num_classes=5)

    full = {"finetuning": "full", "learning_rate": 1e-3}
    return {
        "lm-lora": Kind(make_model, make_rows, {}),
        "lm-head": Kind(make_model, make_rows, {"lora_modules_to_save": ["lm_head"]}),
        "lm-dora-checkpointing": Kind(
            make_model, make_rows, {"use_dora": True, "gradient_checkpointing": True}
        ),
        "lm-full": Kind(make_model, make_rows, full),
        "classes-lora": Kind(make_encoder, classes, CLASSES),
        "classes-lora-checkpointing": Kind(make_encoder, classes, CLASSES | {"gradient_checkpointing": True}),
        "classes-full": Kind(make_encoder, classes, CLASSES | full),
    }


KINDS = [
    "lm-lora",
    "lm-head",
    "lm-dora-checkpointing",
    "lm-full",
    "classes-lora",
    "classes-lora-checkpointing",
    "classes-full",
]


@pytest.fixture
def together(build, make_config):
    """Build participants: on one base with LoRA, each on a model of its own with full fine-tuning."""

    def make(kind, names, *, world=None, **overrides):
        options, parts, base = kind.options | overrides, {}, None
        for number, name in enumerate(names):
            model = kind.model()
            if not kind.is_full:
                base = kind.model() if base is None else base
                torch.manual_seed(3)  # all start from the same adapter, as the recipes do
                base = model = add_adapter(base, make_config(**options), name=name)
            parts[name] = build(
                name,
                model,
                adapter=None if kind.is_full else name,
                rows=kind.rows(13 + 4 * NAMES.index(name), seed=NAMES.index(name)),
                evaluation=kind.rows(5, seed=90),
                seed=SEEDS[name],
                world=world,
                **options,
            )
            torch.manual_seed(number)
        for part in parts.values():
            part.trainer.start()
        return parts

    return make


def same(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def assert_as_if_alone(part, alone, name):
    assert same(part.trainer.state(), alone.trainer.state()), name
    assert [s.loss for s in part.steps] == [s.loss for s in alone.steps], name
    assert part.steps[-1].batch_digest == alone.steps[-1].batch_digest
    slots, other = part.trainer.optimizer_state(), alone.trainer.optimizer_state()
    assert slots.keys() == other.keys()
    assert all(same(slots[slot], other[slot]) for slot in slots), name
    assert part.trainer.evaluate() == alone.trainer.evaluate()


def take_turns(parts, generator):
    """Random turns of 1 to 4 steps; between them what a recipe does, which must change nothing."""
    while waiting := [p for p in parts.values() if p.trainer.step < p.trainer.num_steps]:
        trainer = generator.choice(waiting).trainer
        trainer.fit(trainer.step + generator.randint(1, 4))
        torch.manual_seed(trainer.step)
        between = generator.choice(list(parts.values())).trainer
        match generator.randint(0, 4):
            case 0:
                between.evaluate()
            case 1:
                between.load_state(between.state())
            case 2:
                between.load_optimizer_state(between.optimizer_state())
            case 3:
                between.save()


@pytest.mark.parametrize("kind", KINDS)
def test_any_turns_give_the_bits_of_training_alone(kinds, together, kind):
    kind = kinds[kind]
    parts = together(kind, NAMES)
    take_turns(parts, random.Random(kind.options.get("learning_rate", 0)))
    assert len({part.trainer.num_steps for part in parts.values()}) == 3
    for name in NAMES:
        alone = together(kind, [name])[name]
        alone.trainer.fit(alone.trainer.num_steps)
        assert_as_if_alone(parts[name], alone, name)


@pytest.mark.parametrize("kind", ["lm-lora", "classes-lora"])
def test_mixed_precision_too(kinds, together, kind):
    world = {"use_cpu": True, "bf16": True}
    parts = together(kinds[kind], NAMES, world=world, max_epochs=2)
    take_turns(parts, random.Random(4))
    for name in NAMES:
        alone = together(kinds[kind], [name], world=world, max_epochs=2)[name]
        alone.trainer.fit(alone.trainer.num_steps)
        assert_as_if_alone(parts[name], alone, name)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.slow
def test_many_random_turns(kinds, together, seed):
    generator = random.Random(seed)
    kind = kinds[generator.choice(KINDS)]
    options = {
        "batch_size": generator.randint(1, 4),
        "gradient_accumulation_steps": generator.randint(1, 3),
        "max_epochs": generator.randint(1, 3),
        "length_grouping": generator.random() < 0.5,
    }
    parts = together(kind, NAMES, **options)
    take_turns(parts, generator)
    for name in NAMES:
        alone = together(kind, [name], **options)[name]
        alone.trainer.fit(alone.trainer.num_steps)
        assert_as_if_alone(parts[name], alone, name)


def test_seeds_decide_order_and_dropout(build, make_config, make_model, make_rows):
    """Participants with the same rows differ by their seed alone."""

    def run(seed, **options):
        torch.manual_seed(3)
        model = add_adapter(make_model(), make_config(**options), name="ann")
        part = build("ann", model, adapter="ann", rows=make_rows(14), seed=seed, **options)
        part.trainer.start()
        part.trainer.fit(3)  # with warm-up the first step moves nothing
        return part

    first, again, other = run(1), run(1), run(2)
    assert same(first.trainer.state(), again.trainer.state())
    assert first.steps[-1].batch_digest != other.steps[-1].batch_digest
    # One batch of all rows: what is left of the seed is dropout.
    whole = {"batch_size": 14, "gradient_accumulation_steps": 1, "lora_dropout": 0.0}
    without = [run(seed, **whole).steps[2].loss for seed in (1, 2)]
    assert without[0] == pytest.approx(without[1], abs=2e-6)
    dropout = [run(seed, **whole | {"lora_dropout": 0.5}).steps[2].loss for seed in (1, 2)]
    assert abs(dropout[0] - dropout[1]) > 1e-4


def test_building_leaves_the_generators_of_the_caller(build, make_model, make_config):
    model = add_adapter(make_model(), make_config(), name="ann")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    part.trainer.fit(1)
    part.trainer.evaluate()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["lm-lora", "classes-full"])
def test_who_fails_does_not_touch_the_others(kinds, together, kind):
    kind = kinds[kind]
    parts = together(kind, NAMES)
    for part in parts.values():
        part.trainer.fit(2)
    failing = parts["en"].trainer
    failing.load_state({n: t * float("nan") for n, t in failing.state().items()})
    with pytest.raises(NonFiniteLossError, match="en: the loss of step 3"):
        failing.fit(5)
    failing.close()
    for name in ("en-US", "fr-FR"):
        part = parts[name]
        part.trainer.fit(part.trainer.num_steps)
        alone = together(kind, [name])[name]
        alone.trainer.fit(alone.trainer.num_steps)
        assert_as_if_alone(part, alone, name)


def test_others_come_and_go(kinds, together, build, make_config, make_rows):
    """One trainer is discarded with its adapter and another one is added while the first is in its epoch."""
    kind = kinds["lm-lora"]
    parts = together(kind, ["en-US", "fr-FR"])
    part, gone = parts["en-US"], parts["fr-FR"]
    part.trainer.fit(2)
    gone.trainer.fit(3)
    gone.trainer.close()
    part.trainer.model.delete_adapter("fr-FR")
    part.trainer.fit(5)
    torch.manual_seed(3)
    model = add_adapter(part.trainer.model, make_config(**kind.options), name="sw-KE")
    new = build("sw-KE", model, adapter="sw-KE", rows=make_rows(13), **kind.options)
    new.trainer.start()
    new.trainer.fit(3)
    part.trainer.fit(part.trainer.num_steps)
    alone = together(kind, ["en-US"])["en-US"]
    alone.trainer.fit(alone.trainer.num_steps)
    assert_as_if_alone(part, alone, "en-US")


@pytest.mark.parametrize("name", ["to", "weight", "layers", "a.b", "lora_x", ""])
def test_names_that_no_adapter_can_have(make_model, make_config, name):
    model = add_adapter(make_model(), make_config(), name="default")
    before = set(model.state_dict())
    with pytest.raises(ModelError, match="adapter"):
        add_adapter(model, make_config(), name=name)
    assert set(model.state_dict()) == before
