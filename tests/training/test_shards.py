"""Participants that each take a part of every batch and average after every step are one run on whole batches.

θ − η Σ_k (n_k / n) g_k = Σ_k (n_k / n) (θ − η g_k): with plain SGD the mean of the participants, weighted by what their
losses are means over (tokens of a language model, rows of a classifier), is the step of the whole batch.
"""

import pytest
import torch

from toolkit.modeling.adapters import add_adapter
from toolkit.training.order import EpochOrder

NUM_STEPS = 4
PARTS = {"ann": 1, "bea": 2, "cem": 3}
"""Rows of each participant in a batch of six."""
OPTIONS = {
    "max_epochs": 1,
    "gradient_accumulation_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.0,
}
LORA = {"lora_dropout": 0.0, "lora_r": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def make(build, make_config, make_model, make_encoder, make_rows):
    """make(name, batch_size, rows, seed, task, finetuning) → a started trainer; all start from the same weights."""

    def one(name, batch_size, rows, seed, task, finetuning, **more):
        options = OPTIONS | {"task": task, "finetuning": finetuning, "batch_size": batch_size} | more
        model = make_model() if task == "causal-lm" else make_encoder(**NO_DROPOUT)
        if finetuning == "lora":
            options |= LORA
            torch.manual_seed(3)
            model = add_adapter(model, make_config(**options), name=name)
        adapter = name if finetuning == "lora" else None
        part = build(name, model, adapter=adapter, rows=rows, seed=seed, **options)
        part.trainer.start()
        return part

    return one


def shards_of(rows, seed):
    """Each participant's rows, placed so that its own order gives its part of every batch of the whole run."""
    whole, taken, shards = list(EpochOrder(len(rows), seed)), 0, {}
    for number, (name, size) in enumerate(PARTS.items()):
        wanted = [whole[6 * step + taken + i] for step in range(NUM_STEPS) for i in range(size)]
        taken += size
        placed = [0] * len(wanted)
        for row, position in zip(wanted, EpochOrder(len(wanted), seed + 1 + number), strict=True):
            placed[position] = row
        shards[name] = rows.select(placed)
    return shards


def run_with_merges(make, rows, task, finetuning, weights_of):
    shards = shards_of(rows, seed=7)
    parts = {
        name: make(name, size, shards[name], 8 + number, task, finetuning)
        for number, (name, size) in enumerate(PARTS.items())
    }
    for step in range(1, NUM_STEPS + 1):
        for part in parts.values():
            part.trainer.fit(step)
        weights = weights_of([part.steps[-1] for part in parts.values()])
        states = [part.trainer.state() for part in parts.values()]
        merged = {
            name: sum(w * s[name].double() for w, s in zip(weights, states, strict=True)).to(tensor.dtype)
            for name, tensor in states[0].items()
        }
        for part in parts.values():
            part.trainer.load_state(merged)
    return parts


def by_tokens(steps):
    total = sum(step.num_trainable_tokens for step in steps)
    return [step.num_trainable_tokens / total for step in steps]


def by_rows(steps):
    return [size / 6 for size in PARTS.values()]


def distance(state, other):
    return max((state[name] - other[name]).abs().max().item() for name in state)


CASES = [
    (task, finetuning, by_tokens if task == "causal-lm" else by_rows)
    for task in ("causal-lm", "sequence-classification")
    for finetuning in ("full", "lora")
]


@pytest.mark.parametrize(("task", "finetuning", "weights_of"), CASES)
def test_merging_after_every_step_is_one_run(make, make_rows, task, finetuning, weights_of):
    rows = make_rows(6 * NUM_STEPS, seed=1, num_classes=None if task == "causal-lm" else 5)
    whole = make("whole", 6, rows, 7, task, finetuning)
    before = whole.trainer.state()
    whole.trainer.fit(NUM_STEPS)
    assert distance(before, whole.trainer.state()) > 1e-2
    parts = run_with_merges(make, rows, task, finetuning, weights_of)
    for part in parts.values():
        # fp32 sums in another order, over four steps: a few units in the last place of weights below 1.
        assert distance(part.trainer.state(), whole.trainer.state()) < 1e-6
    for step, merged in enumerate(zip(*(part.steps for part in parts.values()), strict=True)):
        loss = sum(w * s.loss for w, s in zip(weights_of(merged), merged, strict=True))
        assert loss == pytest.approx(whole.steps[step].loss, abs=1e-6)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_other_weights_are_another_run(make, make_rows, task):
    """The weights matter here: the test above would notice if they were wrong."""
    rows = make_rows(6 * NUM_STEPS, seed=1, num_classes=None if task == "causal-lm" else 5)
    whole = make("whole", 6, rows, 7, task, "full")
    whole.trainer.fit(NUM_STEPS)
    parts = run_with_merges(make, rows, task, "full", lambda steps: [1 / 3] * 3)
    assert distance(parts["ann"].trainer.state(), whole.trainer.state()) > 1e-3


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_accumulated_batches_are_one_batch(make, make_rows, task):
    """Also in the last step, whose batches have three rows and one."""
    rows = make_rows(16, seed=1, num_classes=None if task == "causal-lm" else 5)
    whole = make("whole", 6, rows, 7, task, "full")
    parts = make("parts", 3, rows, 7, task, "full", gradient_accumulation_steps=2)
    assert whole.trainer.num_steps == parts.trainer.num_steps == 3
    for part in (whole, parts):
        part.trainer.fit(3)
    assert distance(parts.trainer.state(), whole.trainer.state()) < 1e-6
    assert [s.loss for s in parts.steps] == pytest.approx([s.loss for s in whole.steps], abs=1e-6)
