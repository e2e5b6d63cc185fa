"""The estimate against one example at a time, for whole models and adapters."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from toolkit.data.collate import Collator
from toolkit.errors import DataError, ModelError
from toolkit.merging.fisher import estimate_fisher

CLASSIFIERS = ("xlm-r", "bert", "llama-classifier")
LANGUAGE_MODELS = ("llama", "llama-tied", "gpt2", "qwen3", "gemma2", "mixtral")
WITHOUT_RULE = ("mlp.experts.", "mlp.gate.")


def task_of(name: str) -> str:
    return "sequence-classification" if name in CLASSIFIERS else "causal-lm"


@pytest.mark.parametrize("name", CLASSIFIERS + LANGUAGE_MODELS)
def test_equals_one_example_at_a_time(name, build, rows, loop, assert_equal_fisher) -> None:
    model, task = build(name), task_of(name)
    examples = rows(task)
    fisher = estimate_fisher(model, examples, task=task, batch_size=3)
    assert_equal_fisher(fisher.tensors, loop(model, examples, task))
    assert fisher.num_examples == len(examples)
    expected_slow = {n for n in fisher.tensors if any(part in n for part in WITHOUT_RULE)}
    assert set(fisher.slow_parameters) == expected_slow


def test_is_not_the_square_of_a_batch_gradient(build, rows, loop) -> None:
    model = build("xlm-r")
    examples = rows("sequence-classification")
    fisher = estimate_fisher(model, examples, task="sequence-classification", batch_size=7)
    batch = Collator(1, "sequence-classification")(examples)
    labels = batch.pop("labels")
    torch.nn.functional.cross_entropy(model(**batch).logits, labels, reduction="sum").backward()
    weight = model.classifier.dense.weight
    assert not torch.allclose(fisher.tensors["classifier.dense.weight"], weight.grad**2 / 7, rtol=0.1)


def test_tied_weights_are_there_once(build, rows) -> None:
    fisher = estimate_fisher(build("llama-tied"), rows("causal-lm"), task="causal-lm")
    assert "model.embed_tokens.weight" in fisher.tensors
    assert "lm_head.weight" not in fisher.tensors


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xlm-r", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
        (
            "llama",
            {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_rslora": True, "bias": "all"},
        ),
        ("llama", {"target_modules": ["v_proj"], "task_type": "CAUSAL_LM", "use_dora": True}),
        ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}),
        ("gpt2", {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
    ],
)
def test_adapters(name, options, build, rows, loop, assert_equal_fisher, tmp_path) -> None:
    model, task = get_peft_model(build(name), LoraConfig(r=3, lora_dropout=0.1, **options)), task_of(name)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    examples = rows(task)
    fisher = estimate_fisher(model, examples, task=task, batch_size=4)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as stream:
        saved = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - safe_open is no mapping
    assert fisher.tensors.keys() == saved.keys()
    assert all(fisher.tensors[key].shape == tensor.shape for key, tensor in saved.items())
    expected = loop(model, examples, task)
    by_file_name = {key: expected[_parameter_of(key, expected)] for key in saved}
    assert_equal_fisher(fisher.tensors, by_file_name)


def _parameter_of(key: str, names: dict[str, torch.Tensor]) -> str:
    plain = {n.replace(".modules_to_save.default", "").replace(".default", ""): n for n in names}
    found = plain.get(key) or plain.get(key.replace("lora_magnitude_vector", "lora_magnitude_vector.weight"))
    assert found is not None, key
    return found


def test_frozen_parameters_are_absent(build, rows, loop, assert_equal_fisher) -> None:
    model = build("xlm-r")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.1.output" in name)
    examples = rows("sequence-classification")
    fisher = estimate_fisher(model, examples, task="sequence-classification")
    assert len(fisher.tensors) == 4
    assert_equal_fisher(fisher.tensors, loop(model, examples, "sequence-classification"))


@pytest.mark.parametrize("name", ["xlm-r", "gpt2", "mixtral"])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_and_order_do_not_matter(name, batch_size, build, rows, assert_equal_fisher) -> None:
    model, task = build(name), task_of(name)
    examples = rows(task)
    once = estimate_fisher(model, examples, task=task, batch_size=4)
    shuffled = random.Random(0).sample(examples, len(examples))
    again = estimate_fisher(model, shuffled, task=task, batch_size=batch_size)
    assert_equal_fisher(again.tensors, once.tensors)
    assert again.data_fingerprint == once.data_fingerprint


@pytest.mark.parametrize("name", ["xlm-r", "llama", "llama-tied"])
def test_padding_does_not_count(name, build, rows, assert_equal_fisher) -> None:
    model, task = build(name), task_of(name)
    examples = rows(task)
    alone = estimate_fisher(model, examples, task=task, batch_size=1)
    batch = Collator(model.config.pad_token_id or 0, task, pad_to_multiple_of=32)(examples)
    padded = estimate_fisher(model, [batch], task=task)
    assert_equal_fisher(padded.tensors, alone.tensors)
    assert padded.data_fingerprint == alone.data_fingerprint
    if task == "causal-lm":
        left = {key: _moved_right(value, batch["attention_mask"]) for key, value in batch.items()}
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert_equal_fisher(estimate_fisher(model, iter([left]), task=task).tensors, alone.tensors)


def _moved_right(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.roll(len(row) - int(m.sum())) for row, m in zip(rows, mask, strict=True)])


def test_dropout_is_off_and_training_mode_comes_back(build, rows, loop, assert_equal_fisher) -> None:
    model = build("xlm-r", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    examples = rows("sequence-classification")
    expected = loop(model, examples, "sequence-classification")
    model.train()
    model.roberta.embeddings.eval()
    found = estimate_fisher(model, examples, task="sequence-classification")
    assert_equal_fisher(found.tensors, expected)
    assert model.training
    assert not model.roberta.embeddings.training
    assert not model.roberta.embeddings.dropout.training


def test_nothing_of_the_model_is_changed_even_by_an_exception(build, rows) -> None:
    model = build("llama-tied").train()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    kept = model.model.norm.weight
    kept.grad = torch.ones_like(kept)

    def fail(num_done: int, num_total: int) -> None:
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        estimate_fisher(model, rows("causal-lm"), task="causal-lm", batch_size=2, on_progress=fail)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "model.layers.0.mlp.up_proj.weight"
    ]
    assert not frozen.requires_grad
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_progress_counts_examples(build, rows) -> None:
    seen: list[tuple[int, int]] = []
    estimate_fisher(
        build("xlm-r"),
        rows("sequence-classification"),
        task="sequence-classification",
        batch_size=3,
        on_progress=lambda *counts: seen.append(counts),
    )
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_examples_are_drawn_by_the_seed(build, rows, loop, assert_equal_fisher) -> None:
    model, examples = build("xlm-r"), rows("sequence-classification", 20)

    def drawn(seed: int) -> str:
        found = estimate_fisher(model, examples, task="sequence-classification", num_examples=5, seed=seed)
        assert found.num_examples == 5
        return found.data_fingerprint

    assert drawn(0) == drawn(0) != drawn(1)
    # of batches the first examples
    batches = [Collator(1, "sequence-classification")(examples[n : n + 4]) for n in range(0, 20, 4)]
    found = estimate_fisher(model, batches, task="sequence-classification", num_examples=6)
    assert_equal_fisher(found.tensors, loop(model, examples[:6], "sequence-classification"))


def test_packed_rows_are_taken_apart(build, rows, assert_equal_fisher) -> None:
    model, examples = build("llama"), rows("causal-lm")
    packed = []
    for group in (examples[:3], examples[3:]):
        joined = {key: [token for row in group for token in row[key]] for key in ("input_ids", "labels")}
        packed.append(joined | {"seq_lengths": [len(row["input_ids"]) for row in group]})
    plain = estimate_fisher(model, examples, task="causal-lm")
    unpacked = estimate_fisher(model, packed, task="causal-lm")
    assert unpacked.num_examples == 7
    assert unpacked.data_fingerprint == plain.data_fingerprint
    assert_equal_fisher(unpacked.tensors, plain.tensors)


def test_rows_without_a_trained_token_do_not_count(build, rows) -> None:
    examples = rows("causal-lm")
    silent = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}  # nothing predicts the first token
    with_silent = estimate_fisher(build("llama"), [silent, *examples], task="causal-lm")
    assert with_silent.num_examples == len(examples)
    with pytest.raises(DataError, match="no example with a label"):
        estimate_fisher(build("llama"), [silent], task="causal-lm")


def test_low_precision_models_are_summed_in_float32(build, rows, loop) -> None:
    examples = rows("causal-lm")
    expected = loop(build("llama"), examples, "causal-lm")
    found = estimate_fisher(build("llama").to(torch.bfloat16), examples, task="causal-lm")
    assert found.slow_parameters == ()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == torch.float32
        assert (found.tensors[name] - tensor).norm() <= 0.1 * tensor.norm(), name


def test_wrong_input_is_named(build, rows) -> None:
    examples = rows("sequence-classification")
    model = build("xlm-r")
    with pytest.raises(ModelError, match="no logits of a causal-lm model"):
        estimate_fisher(model, rows("causal-lm"), task="causal-lm")
    with pytest.raises(ModelError, match="class 9, the model has 5"):
        estimate_fisher(model, [examples[0] | {"labels": 9}], task="sequence-classification")
    with pytest.raises(ModelError, match="regression"):
        estimate_fisher(build("xlm-r", num_labels=1), examples, task="sequence-classification")
    with pytest.raises(ModelError, match="requires gradients"):
        estimate_fisher(model.requires_grad_(False), examples, task="sequence-classification")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["xlm-r", "llama-tied", "gpt2", "gemma2"])
def test_an_accelerator_gives_the_same(name, build, rows, loop, assert_equal_fisher) -> None:
    model, task = build(name), task_of(name)
    examples = rows(task)
    expected = loop(model, examples, task)
    found = estimate_fisher(model.to("cuda"), examples, task=task, batch_size=3)
    assert all(tensor.is_cuda for tensor in found.tensors.values())
    cpu = {key: tensor.cpu() for key, tensor in found.tensors.items()}
    assert_equal_fisher(cpu, expected, relative=1e-4)
