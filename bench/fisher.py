"""Fisher estimation against a plain backward pass and against one example at a time.

    python bench/fisher.py [--e5 FOLDER] [--smollm2 FOLDER] [--repeats 9] [--out bench/results/fisher.json]

Models: multilingual-e5-small as a classifier of 38 classes, once with its word embeddings frozen (21 M linear
parameters are trained) and once whole, and a Llama of 20 M parameters with random weights; with --smollm2 also
SmolLM2-135M with its tied embeddings. For each batch three ways alternate, A B C C B A, in one process:

- plain: forward and backward of the summed loss with gradients of all trained weights, as a training step does;
- fisher: what the estimator does with a batch;
- loop: forward and backward of one example at a time, gradients squared and added.

Reported: medians in milliseconds, and the medians over the rounds of fisher / plain and loop / plain.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from toolkit.merging.fisher.batches import Batch
from toolkit.merging.fisher.estimator import BatchEstimator
from toolkit.merging.fisher.likelihood import Target, Task, log_likelihoods

SHAPES = ((16, 16), (16, 32), (16, 128), (4, 256))
NUM_CLASSES = 38


def random_batch(num_examples: int, num_tokens: int, task: Task) -> Batch:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(5, 1000, (num_examples, num_tokens), generator=generator)
    labels = (
        ids if task == "causal-lm" else torch.randint(0, NUM_CLASSES, (num_examples,), generator=generator)
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs, labels, [str(n) for n in range(num_examples)])


def ways(model: Any, batch: Batch, task: Task) -> dict[str, Callable[[], object]]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    estimator = BatchEstimator(model, parameters, [batch], task)
    estimator.choose_paths()
    assert not estimator.slow
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def backward(part: Batch) -> None:
        model.zero_grad(set_to_none=True)
        logits = model(**part.inputs, **({"use_cache": False} if task == "causal-lm" else {})).logits
        log_likelihoods(logits, Target(part.labels), task).sum().backward()

    def loop() -> None:
        for row in range(len(batch)):
            backward(batch.select([row]))
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    squares[name].addcmul_(parameter.grad, parameter.grad)

    return {
        "plain": lambda: backward(batch),
        "fisher": lambda: estimator.add(batch),
        "loop": loop,
    }


def measure(model: Any, task: Task, num_examples: int, num_tokens: int, repeats: int) -> dict[str, float]:
    functions = ways(model, random_batch(num_examples, num_tokens, task), task)
    for function in functions.values():
        function()
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        order = list(functions) if repeat % 2 == 0 else list(reversed(functions))
        for name in order:
            began = time.perf_counter()
            functions[name]()
            rounds[name].append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    result = {f"{name}_milliseconds": round(statistics.median(s) * 1e3, 2) for name, s in rounds.items()}
    for name in ("fisher", "loop"):
        ratios = [a / b for a, b in zip(rounds[name], rounds["plain"], strict=True)]
        result[f"{name}_over_plain"] = round(statistics.median(ratios), 3)
    return result


def models(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[Callable[[], Any], Task]]:
    def e5(*, whole: bool) -> Any:
        source = arguments.e5 or make("multilingual-e5-small", folder / "e5")
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=NUM_CLASSES)
        for parameter in model.roberta.embeddings.parameters():
            parameter.requires_grad_(whole)
        return model

    def llama() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config)

    found: dict[str, tuple[Callable[[], Any], Task]] = {
        "multilingual-e5-small, embeddings frozen": (lambda: e5(whole=False), "sequence-classification"),
        "multilingual-e5-small, whole": (lambda: e5(whole=True), "sequence-classification"),
        "Llama of 20 M": (llama, "causal-lm"),
    }
    if arguments.smollm2:
        found["SmolLM2-135M, tied"] = (
            lambda: AutoModelForCausalLM.from_pretrained(arguments.smollm2, dtype=torch.float32),
            "causal-lm",
        )
    return found


def make(name: str, folder: Path) -> Path:
    from toolkit.modeling.samples import make as make_sample

    return make_sample(name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--e5", type=Path, help="the folder of multilingual-e5-small; without it one is made")
    parser.add_argument("--smollm2", type=Path, help="the folder of smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", help="the models whose name contains this")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python bench/fisher.py",
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "repeats": arguments.repeats,
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (build, task) in models(arguments, Path(folder)).items():
            if arguments.only and arguments.only not in name:
                continue
            model = build().eval()
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row = report["models"][name] = {"num_trained_parameters": trained, "batches": {}}
            for num_examples, num_tokens in SHAPES:
                result = measure(model, task, num_examples, num_tokens, arguments.repeats)
                row["batches"][f"{num_examples} x {num_tokens} tokens"] = result
                print(name, num_examples, num_tokens, result, flush=True)
            del model
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
