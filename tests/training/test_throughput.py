"""What --throughput chooses, and that no choice changes what is trained."""

import pytest
import torch

from toolkit.errors import LaunchError
from toolkit.modeling.adapters import add_adapter
from toolkit.training import probing, throughput

PLAIN = {"throughput": "off", "gradient_checkpointing": False}
STEPS = 3


@pytest.fixture
def trained(build, make_model, make_config):
    """trained(step_layout="dense", …) → a participant after three steps of four ragged rows each, without dropout."""

    def run(**overrides):
        options = (
            PLAIN | {"lora_dropout": 0.0, "max_steps": STEPS, "gradient_accumulation_steps": 2} | overrides
        )
        torch.manual_seed(0)
        model = make_model()
        if options.get("finetuning") != "full":
            model = add_adapter(model, make_config(**options), name="ann")
        torch.manual_seed(100)
        adapter = None if options.get("finetuning") == "full" else "ann"
        if adapter is None:
            options.pop("lora_dropout")
        part = build("ann", model, adapter=adapter, **options)
        part.trainer.start()
        part.trainer.fit(STEPS)
        return part

    return run


@pytest.mark.parametrize(
    "choice",
    [
        {"step_layout": "dense"},
        {
            "step_layout": "dense",
            "batch_size": 1,
            "gradient_accumulation_steps": 4,
        },  # micro-batches of one long row
        {"fused_loss": True},
        {"gradient_checkpointing": True},
        {"optim": "adamw_torch_fused"},
        {"throughput": "auto", "gradient_checkpointing": None},
    ],
    ids=["dense", "dense in little memory", "fused loss", "checkpointing", "fused optimizer", "auto"],
)
@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_a_choice_leaves_losses_and_weights_as_they_are(trained, choice, finetuning):
    """Tolerance 2e-5 of losses near 4, and of weights that moved by steps of 1e-2."""
    plain = trained(finetuning=finetuning)
    chosen = trained(finetuning=finetuning, **choice)
    assert chosen.trainer.step == plain.trainer.step == STEPS
    for mine, theirs in zip(chosen.steps, plain.steps, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=2e-5)
        assert mine.batch_digest == theirs.batch_digest
        counts = ("num_tokens", "num_trainable_tokens", "learning_rate")
        assert [getattr(mine, name) for name in counts] == [getattr(theirs, name) for name in counts]
    states = plain.trainer.state(), chosen.trainer.state()
    assert all(torch.allclose(states[1][name], states[0][name], atol=2e-5) for name in states[0])


def test_checkpointing_leaves_the_bits(trained):
    states = [trained(gradient_checkpointing=value).trainer.state() for value in (False, True)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_choices_are_in_effect(trained):
    """Each switch alone, and what it does to the trainer."""
    plain = trained().trainer
    assert (plain.throughput.costs, plain.throughput.fused_loss) == (None, False)
    assert plain.underlying.args.gradient_accumulation_steps == 2
    assert plain.underlying.args.optim == "adamw_torch"
    dense = trained(step_layout="dense").trainer
    assert dense.underlying.args.gradient_accumulation_steps == 1
    assert dense.underlying.args.per_device_train_batch_size == 4
    assert trained(fused_loss=True).trainer.underlying.has_fused_loss
    auto = trained(throughput="auto", gradient_checkpointing=None).trainer
    assert auto.throughput.costs is not None
    assert auto.throughput.fused_loss
    assert not auto.underlying.args.gradient_checkpointing
    assert auto.underlying.args.optim == "adamw_torch_fused"
    assert [note.partition(":")[0] for note in auto.throughput_notes] == [
        "fused loss",
        "dense layout",
        "no gradient checkpointing",
        "optimizer adamw_torch_fused",
    ]
    switched_off = trained(
        throughput="auto", step_layout="rows", fused_loss=False, optim="adamw_torch"
    ).trainer
    assert switched_off.throughput_notes == ()


def test_dense_micro_batches_stay_within_the_largest_batch(trained, make_rows):
    longest = max(make_rows(18)["length"])
    costs = trained(step_layout="dense", batch_size=1, gradient_accumulation_steps=4).trainer.throughput.costs
    assert costs is not None
    assert costs.capacity == longest


def test_activations_are_recomputed_where_memory_is_short(trained, monkeypatch):
    monkeypatch.setattr(throughput, "_free_bytes", lambda device: 100_000)
    part = trained(throughput="auto", gradient_checkpointing=None)
    assert part.trainer.underlying.args.gradient_checkpointing
    assert any(note.startswith("gradient checkpointing: ") for note in part.trainer.throughput_notes)


def test_activation_bytes_grow_with_the_model_and_not_with_its_weights(make_model):
    import contextlib

    measured = {
        layers: probing.activation_bytes_per_token(
            make_model(num_hidden_layers=layers), contextlib.nullcontext()
        )
        for layers in (1, 2, 3)
    }
    a_layer = measured[2] - measured[1]
    assert a_layer > 4 * 32 * 8  # more than eight hidden states in float32
    assert measured[3] - measured[2] == pytest.approx(a_layer, rel=0.05)
    wide = probing.activation_bytes_per_token(make_model(vocab_size=6400), contextlib.nullcontext())
    assert wide == pytest.approx(measured[2], rel=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step_layout": "dense", "task": "sequence-classification"}, "--step-layout"),
        ({"fused_loss": True, "task": "sequence-classification"}, "--fused-loss"),
        ({"tf32": True}, "--tf32"),
    ],
)
def test_what_cannot_be_is_an_error(build, make_encoder, make_model, make_rows, options, said):
    is_classifier = options.get("task") == "sequence-classification"
    model = make_encoder() if is_classifier else make_model()
    rows = make_rows(18, num_classes=5) if is_classifier else None
    with pytest.raises(LaunchError, match=said):
        build("ann", model, adapter=None, finetuning="full", rows=rows, **PLAIN, **options)


def test_a_model_whose_rows_see_each_other_is_found():
    """Mamba carries a state from row to row, whatever the positions are."""
    import contextlib

    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2))
    assert not probing.rows_stay_apart(model, contextlib.nullcontext(), tells_rows=False)


def test_a_capped_loss_is_found():
    import contextlib

    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for cap, agrees in ((None, True), (0.5, False)):
        config = Gemma2Config(
            vocab_size=64, num_key_value_heads=2, head_dim=8, final_logit_softcapping=cap, **small
        )
        model = Gemma2ForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
        assert probing.fused_loss_agrees(model, contextlib.nullcontext()) is agrees
