"""Moments that are taken out of a trainer, put back, reset, and used as Fisher information."""

import pytest
import torch

from toolkit.errors import ModelError
from toolkit.modeling.adapters import add_adapter


@pytest.fixture
def started(build, make_model, make_config):
    """A started trainer; ``adapter=None`` trains the whole model."""

    def make(*, name="ann", adapter="ann", model=None, **options):
        torch.manual_seed(0)
        model = make_model() if model is None else model
        if adapter is not None:
            model = add_adapter(model, make_config(**options), name=adapter)
        part = build(name, model, adapter=adapter, **options)
        part.trainer.start()
        return part

    return make


FULL = {"adapter": None, "finetuning": "full"}


def same(slots, other) -> bool:
    return slots.keys() == other.keys() and all(
        slots[s].keys() == other[s].keys() and all(torch.equal(slots[s][n], other[s][n]) for n in slots[s])
        for s in slots
    )


@pytest.mark.parametrize("options", [{}, FULL, {"lora_modules_to_save": ["lm_head"]}])
def test_moments_have_the_names_of_the_state(started, options):
    part = started(**options)
    assert part.trainer.optimizer_state() == {}
    part.trainer.fit(2)
    slots = part.trainer.optimizer_state()
    assert slots.keys() == {"exp_avg", "exp_avg_sq"}
    state = part.trainer.state()
    for tensors in slots.values():
        assert tensors.keys() == state.keys()
        assert all(tensors[n].shape == state[n].shape for n in state)


@pytest.mark.parametrize(
    ("optim", "slots"), [("sgd", set()), ("rmsprop", {"square_avg"}), ("adagrad", {"sum"})]
)
def test_slots_of_other_optimizers(started, optim, slots):
    part = started(optim=optim)
    part.trainer.fit(2)
    assert part.trainer.optimizer_state().keys() == slots
    part.trainer.load_optimizer_state(part.trainer.optimizer_state())
    part.trainer.reset_optimizer()
    part.trainer.fit(4)


def test_tied_tensors_come_under_both_names(started, make_model):
    model = make_model(tie_word_embeddings=True)
    part = started(model=model, **FULL)
    part.trainer.fit(1)
    moments = part.trainer.optimizer_state()["exp_avg"]
    assert torch.equal(moments["lm_head.weight"], moments["model.embed_tokens.weight"])
    assert part.trainer.second_moments().keys() == part.trainer.state().keys()


@pytest.mark.parametrize("options", [{}, FULL])
def test_putting_them_back_changes_nothing(started, options):
    whole, paused = started(**options), started(**options)
    whole.trainer.fit(15)
    while paused.trainer.step < 15:
        paused.trainer.load_state(paused.trainer.state())
        paused.trainer.load_optimizer_state(paused.trainer.optimizer_state())
        paused.trainer.fit(paused.trainer.step + 4)
    assert same(whole.trainer.optimizer_state(), paused.trainer.optimizer_state())
    assert same({"": whole.trainer.state()}, {"": paused.trainer.state()})
    assert [s.loss for s in whole.steps] == [s.loss for s in paused.steps]


def test_copies_are_copies_and_loads_are_loads(started):
    part, other = started(), started()
    part.trainer.fit(3)
    other.trainer.fit(3)
    slots = part.trainer.optimizer_state()
    doubled = {s: {n: 2 * t for n, t in tensors.items()} for s, tensors in slots.items()}
    part.trainer.load_optimizer_state(doubled)
    assert same(part.trainer.optimizer_state(), doubled)
    assert not same(slots, doubled)
    part.trainer.fit(6)
    other.trainer.fit(6)
    assert not same({"": part.trainer.state()}, {"": other.trainer.state()})


def test_wrong_slots_change_nothing(started):
    part = started()
    with pytest.raises(ValueError, match="slots do not fit the optimizer: missing \\[\\], foreign"):
        part.trainer.load_optimizer_state({"exp_avg": {}})
    part.trainer.fit(2)
    before = part.trainer.optimizer_state()
    name = next(reversed(before["exp_avg_sq"]))
    zeros = {s: {n: torch.zeros_like(t) for n, t in tensors.items()} for s, tensors in before.items()}
    for wrong, message in (
        ({"exp_avg": zeros["exp_avg"]}, "missing \\['exp_avg_sq'\\]"),
        (zeros | {"exp_avg_sq": {n: t for n, t in zeros["exp_avg_sq"].items() if n != name}}, "missing"),
        (zeros | {"exp_avg_sq": zeros["exp_avg_sq"] | {name: torch.zeros(1)}}, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            part.trainer.load_optimizer_state(wrong)
        assert same(before, part.trainer.optimizer_state())


@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad"])
def test_a_reset_optimizer_is_new_and_the_schedule_goes_on(started, optim):
    """One step after a reset equals the first step of a new optimizer with the learning rate of now."""
    options = {
        "optim": optim,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
    }
    part = started(**options)
    part.trainer.fit(6)
    part.trainer.reset_optimizer()
    with pytest.raises(ModelError, match="no second moments"):
        part.trainer.second_moments()
    before = part.trainer.state()
    part.trainer.fit(7)
    rate = part.steps[6].learning_rate
    assert rate == pytest.approx(1e-2 * (1 - 6 / 15))
    for name, tensor in part.trainer.state().items():
        moved = (tensor - before[name]).abs()
        # The first step of Adam and of Adagrad is lr * sign(g), but for epsilon.
        assert moved.max() <= rate * (1 + 1e-4), name
        assert moved.max() > 0.98 * rate, name
    kept = started(**options)
    kept.trainer.fit(7)
    assert not same({"": kept.trainer.state()}, {"": part.trainer.state()})


def test_counts_of_steps_stay_when_moments_are_loaded(started):
    part = started()
    part.trainer.fit(2)
    early = part.trainer.optimizer_state()
    part.trainer.fit(5)
    part.trainer.load_optimizer_state(early)
    factor = 1 - 0.999**5
    for name, fisher in part.trainer.second_moments().items():
        torch.testing.assert_close(
            fisher.double() * factor, early["exp_avg_sq"][name].double(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("options", [{}, FULL])
def test_second_moments_are_the_mean_of_squared_gradients(started, options):
    part = started(max_grad_norm=0.0, **options)
    model = part.trainer.model
    gradients: dict[int, list[torch.Tensor]] = {}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def collect(optimizer, *_):
        for number, parameter in enumerate(parameters):
            gradients.setdefault(number, []).append(parameter.grad.double().square())

    part.trainer._trainer.optimizer.optimizer.register_step_pre_hook(collect)
    part.trainer.fit(4)
    shares = torch.tensor([0.999 ** (3 - t) for t in range(4)], dtype=torch.float64)
    expected = [
        sum(s * g for s, g in zip(shares, gradients[n], strict=True)) / shares.sum() for n in gradients
    ]
    fisher = part.trainer.second_moments()
    assert fisher.keys() == part.trainer.state().keys()
    assert all(tensor.dtype == torch.float32 for tensor in fisher.values())
    by_shape = sorted((e.shape, float(e.sum())) for e in expected)
    for (shape, total), tensor in zip(
        by_shape, sorted(fisher.values(), key=lambda t: (t.shape, float(t.sum()))), strict=True
    ):
        assert tensor.shape == shape
        assert float(tensor.double().sum()) == pytest.approx(total, rel=1e-5)


def test_an_optimizer_without_them_is_refused(started):
    part = started(optim="sgd")
    part.trainer.fit(2)
    with pytest.raises(ModelError, match="SGD holds no second moments"):
        part.trainer.second_moments()


def test_moments_in_eight_bits_are_refused(started):
    part = started()
    part.trainer.fit(1)
    state = next(iter(part.trainer._trainer.optimizer.optimizer.state.values()))
    state["state1"] = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"holds state1 of .* as torch.uint8"):
        part.trainer.optimizer_state()
