"""The trainer contract on the Hugging Face backend: pausing, many on one base, saving, resuming."""

import time

import pytest
import torch

from toolkit.errors import CheckpointError, NonFiniteLossError
from toolkit.modeling.adapters import add_adapter


@pytest.fixture
def solo(build, make_model, make_config, make_rows):
    """Train one participant alone, in one fit; return its weights and steps."""

    def run(name="ann", seed=0, rows=None, **overrides):
        torch.manual_seed(seed)
        model = add_adapter(make_model(), make_config(**overrides), name=name)
        torch.manual_seed(100 + seed)
        part = build(name, model, adapter=name, rows=rows, **overrides)
        part.trainer.start()
        part.trainer.fit(part.trainer.num_steps)
        return part

    return run


def same(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def test_pausing_after_every_step_changes_nothing(solo, build, make_model, make_config):
    whole = solo()
    torch.manual_seed(0)
    model = add_adapter(make_model(), make_config(), name="ann")
    torch.manual_seed(100)
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    while part.trainer.step < part.trainer.num_steps:
        part.trainer.fit(part.trainer.step + 1)
        torch.manual_seed(
            part.trainer.step
        )  # what else happens in the process must not reach the participant
    assert part.trainer.num_steps == 15
    assert same(whole.trainer.state(), part.trainer.state())
    assert [s.loss for s in whole.steps] == [s.loss for s in part.steps]
    assert whole.steps[-1].batch_digest == part.steps[-1].batch_digest


def test_two_participants_on_one_base_are_as_if_alone(solo, build, make_model, make_config, make_rows):
    rows = {"ann": make_rows(18, seed=1), "bea": make_rows(14, seed=2)}
    alone = {name: solo(name, seed=i, rows=rows[name]) for i, name in enumerate(("ann", "bea"))}
    model, parts = make_model(), {}
    for i, name in enumerate(("ann", "bea")):
        torch.manual_seed(i)
        make_model()  # solo() draws the base between the seed and the adapter
        model = add_adapter(model, make_config(), name=name)
        torch.manual_seed(100 + i)
        parts[name] = build(name, model, adapter=name, rows=rows[name])
    for part in parts.values():
        part.trainer.start()
    while any(p.trainer.step < p.trainer.num_steps for p in parts.values()):
        for part in parts.values():
            part.trainer.fit(part.trainer.step + part.trainer.num_steps_per_epoch)
    for name, part in parts.items():
        assert same(alone[name].trainer.state(), part.trainer.state()), name
        assert [s.loss for s in alone[name].steps] == [s.loss for s in part.steps]


@pytest.mark.parametrize("at", [1, 5, 7, 10])
@pytest.mark.parametrize("grouping", [False, True])
def test_resume_is_bit_for_bit(solo, build, make_model, make_config, at, grouping):
    options = {"length_grouping": grouping}
    whole = solo(**options)
    torch.manual_seed(0)
    model = add_adapter(make_model(), make_config(), name="ann")
    torch.manual_seed(100)
    first = build("ann", model, adapter="ann", **options)
    first.trainer.start()
    first.trainer.fit(at)
    checkpoint = first.trainer.save()
    first.trainer.close()

    torch.manual_seed(999)
    second = build("ann", add_adapter(make_model(), make_config(), name="ann"), adapter="ann", **options)
    second.trainer.start(checkpoint)
    assert second.trainer.step == at
    second.trainer.fit(second.trainer.num_steps)
    assert same(whole.trainer.state(), second.trainer.state())
    assert len(whole.steps) > len(first.steps)
    for ours, theirs in zip(second.steps, whole.steps[len(first.steps) :], strict=True):
        assert ours.loss == theirs.loss
        assert ours.batch_digest == theirs.batch_digest
        assert ours.total_tokens == theirs.total_tokens
        assert ours.total_trainable_tokens == theirs.total_trainable_tokens


def test_a_cold_start_is_not_a_resume(solo, build, make_model, make_config):
    """The optimizer's moments matter here: the test above would notice if they were lost."""
    whole = solo()
    torch.manual_seed(0)
    model = add_adapter(make_model(), make_config(), name="ann")
    torch.manual_seed(100)
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    part.trainer.fit(5)
    for group in part.trainer._trainer.optimizer.state.values():
        group["exp_avg"].zero_()
    part.trainer.fit(part.trainer.num_steps)
    assert not same(whole.trainer.state(), part.trainer.state())


def test_evaluation_changes_nothing_and_does_not_depend_on_the_batch_size(
    solo, build, make_model, make_config, make_rows
):
    whole = solo()
    losses = []
    for batch_size in (1, 3, 8):
        torch.manual_seed(0)
        model = add_adapter(make_model(), make_config(), name="ann")
        torch.manual_seed(100)
        part = build("ann", model, adapter="ann", evaluation=make_rows(7, seed=5), eval_batch_size=batch_size)
        part.trainer.start()
        before = part.trainer.evaluate()
        for step in range(1, part.trainer.num_steps + 1):
            part.trainer.fit(step)
            part.trainer.evaluate()
        assert same(whole.trainer.state(), part.trainer.state())
        losses.append(before["loss"])
    assert max(losses) - min(losses) < 1e-6


def test_held_out_loss_against_fp64(build, make_model, make_config, make_rows):
    rows = make_rows(7, seed=5)
    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann", evaluation=rows)
    part.trainer.start()
    loss_sum, count = 0.0, 0
    reference = make_model().double().eval()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p = reference(input_ids=ids).logits.double().log_softmax(-1)
        for t in range(1, ids.shape[1]):
            if row["labels"][t] != -100:
                loss_sum -= log_p[0, t - 1, row["labels"][t]].item()
                count += 1
    metrics = part.trainer.evaluate()
    assert metrics["num_tokens"] == count
    assert metrics["loss"] == pytest.approx(loss_sum / count, abs=2e-6)


def test_accumulation_equals_a_larger_batch(solo):
    small = solo(batch_size=1, gradient_accumulation_steps=4, lora_dropout=0.0)
    large = solo(batch_size=4, gradient_accumulation_steps=1, lora_dropout=0.0)
    assert small.trainer.num_steps == large.trainer.num_steps
    for a, b in zip(small.steps, large.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=3e-6)
        assert a.num_trainable_tokens == b.num_trainable_tokens
    for name, tensor in small.trainer.state().items():
        assert torch.allclose(tensor, large.trainer.state()[name], atol=2e-4), name


def test_counts_are_those_of_the_data(solo, make_rows):
    rows = make_rows(18)
    part = solo(rows=rows)
    tokens = sum(rows["length"])
    trained = sum(sum(label != -100 for label in labels[1:]) for labels in rows["labels"])
    assert part.steps[-1].total_tokens == 3 * tokens
    assert part.steps[-1].total_trainable_tokens == 3 * trained
    assert sum(s.num_tokens for s in part.steps) == 3 * tokens


def test_order_does_not_repeat_between_epochs_and_seeds(solo):
    assert solo(seed=0).steps[-1].batch_digest == solo(seed=1).steps[-1].batch_digest
    digests = {solo(max_epochs=1, **{"seed": 0}).steps[-1].batch_digest}
    other = solo(max_epochs=2).steps
    assert other[4].batch_digest in digests
    from toolkit.training.order import EpochOrder

    order = EpochOrder(18, seed=7)
    first = list(order)
    order.set_epoch(1)
    assert sorted(first) == list(range(18))
    assert first != list(order)
    assert first != list(EpochOrder(18, seed=8))


def test_stop_request_pauses_after_the_step(build, make_model, make_config):
    wants_stop = []
    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann", stop=lambda: bool(wants_stop))
    part.trainer.start()
    assert part.trainer.fit(3)
    wants_stop.append(True)
    assert not part.trainer.fit(part.trainer.num_steps)
    assert part.trainer.step == 4


def test_non_finite_loss_stops_before_the_step(build, make_model, make_config):
    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    part.trainer.fit(2)
    before = part.trainer.state()
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"ann: the loss of step 3 is not a finite number"):
        part.trainer.fit(5)
    assert same(before, part.trainer.state())


def test_state_round_trip_and_wrong_states(build, make_model, make_config):
    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    part.trainer.fit(2)
    state = part.trainer.state()
    part.trainer.fit(4)
    assert not same(state, part.trainer.state())
    part.trainer.load_state(state)
    assert same(state, part.trainer.state())
    name = next(iter(state))
    with pytest.raises(ValueError, match="missing"):
        part.trainer.load_state({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="shape"):
        part.trainer.load_state(state | {name: torch.zeros(1)})


def test_another_number_of_processes_is_refused(build, make_model, make_config):
    import json

    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    part.trainer.fit(1)
    folder = part.trainer.save()
    position = json.loads((folder / "position.json").read_text())
    (folder / "position.json").write_text(json.dumps(position | {"num_processes": 2}))
    again = build("ann", add_adapter(make_model(), make_config(), name="ann"), adapter="ann")
    with pytest.raises(CheckpointError, match="2 processes"):
        again.trainer.start(folder)


def test_a_gradient_that_is_not_finite_stops_before_the_step(build, make_model, make_config):
    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    part.trainer.fit(2)
    before = part.trainer.state()
    weight = next(p for n, p in model.named_parameters() if "lora_A.ann" in n)
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLossError, match="ann: the gradient of step 3"):
        part.trainer.fit(5)
    hook.remove()
    assert same(before, part.trainer.state())


def test_pauses_are_no_part_of_a_step(build, make_model, make_config):
    model = add_adapter(make_model(), make_config(), name="ann")
    part = build("ann", model, adapter="ann")
    part.trainer.start()
    part.trainer.fit(2)
    time.sleep(1.0)
    part.trainer.fit(3)
    assert part.steps[2].step_seconds < 0.8


def test_turns_in_mid_epoch_with_accumulation(solo, build, make_model, make_config, make_rows):
    """Ann is paused before the short last step of her epoch, Bea in the middle of hers: both steps count."""
    options = {"gradient_accumulation_steps": 2, "batch_size": 2}
    rows = {"ann": make_rows(10, seed=1), "bea": make_rows(16, seed=2)}
    alone = {name: solo(name, seed=i, rows=rows[name], **options) for i, name in enumerate(rows)}
    model, parts = make_model(), {}
    for i, name in enumerate(rows):
        torch.manual_seed(i)
        make_model()
        model = add_adapter(model, make_config(**options), name=name)
        parts[name] = build(name, model, adapter=name, rows=rows[name], **options)
    for part in parts.values():
        part.trainer.start()
    while any(p.trainer.step < p.trainer.num_steps for p in parts.values()):
        for part in parts.values():
            part.trainer.fit(part.trainer.step + 1)
    for name, part in parts.items():
        assert same(alone[name].trainer.state(), part.trainer.state()), name


def test_checkpoints_of_two_adapters_on_one_base_are_apart(build, make_model, make_config, make_rows):
    model, parts, states, folders = make_model(), {}, {}, {}
    for i, name in enumerate(("ann", "bea")):
        torch.manual_seed(i)
        model = add_adapter(model, make_config(), name=name)
        parts[name] = build(name, model, adapter=name, rows=make_rows(18, seed=i))
    for i, (name, part) in enumerate(parts.items()):
        part.trainer.start()
        part.trainer.fit(3 + i)
        folders[name], states[name] = part.trainer.save(), part.trainer.state()
    assert not (folders["ann"] / "bea").exists()
    again, restored = make_model(), {}
    for i, name in enumerate(("ann", "bea")):
        again = add_adapter(again, make_config(), name=name)
        restored[name] = build(name, again, adapter=name, rows=make_rows(18, seed=i))
    for name in ("bea", "ann"):
        restored[name].trainer.start(folders[name])
    for name in ("ann", "bea"):
        assert same(states[name], restored[name].trainer.state()), name
    third = build("bea", again, adapter="bea")
    with pytest.raises(CheckpointError, match="a checkpoint of ann, not of bea"):
        third.trainer.start(folders["ann"])
