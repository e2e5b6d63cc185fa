"""States, options and cases that the tests of this folder share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from toolkit.rounds.merging import Contribution

PARTICIPANTS = ("en-US", "fr-FR", "de-DE", "sq-AL", "ja-JP")
State = dict[str, torch.Tensor]


def options(**given: Any) -> SimpleNamespace:
    """The options that a coordinator reads, with the recipe's defaults."""
    defaults = {
        "merge_algorithm": "linear",
        "merge_parameters": {},
        "lora_merge": "auto",
        "merge_timeout": 600.0,
        "max_merge_attempts": 3,
        "validate_merge_integrity": True,
    }
    return SimpleNamespace(**{**defaults, **given})


def full_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    """Like a small model's: a large embedding, layers, vectors, a scalar, integers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "embeddings.weight": draw(700, 24),
        "layer.0.weight": draw(24, 48),
        "layer.0.bias": draw(48),
        "layer.1.weight": draw(48, 24),
        "positions": torch.arange(9),
        "temperature": draw(),
        "norm.weight": draw(24),
    }


def tied_state(seed: int) -> State:
    """One whose first tensor has a second name."""
    state = full_state(seed)
    return {**state, "head.weight": state["embeddings.weight"].clone()}


def lora_state(seed: int, *, apart: float = 0.02) -> State:
    """An adapter that began where all of them do, and moved on."""
    shared, own = torch.Generator().manual_seed(1000), torch.Generator().manual_seed(seed)
    state: State = {}
    for number, (out, into) in enumerate(((40, 64), (64, 40))):
        name = f"base_model.model.layer.{number}.dense"
        a = torch.empty(4, into).uniform_(-0.2, 0.2, generator=shared)
        state[f"{name}.lora_A.weight"] = a + apart * torch.randn(4, into, generator=own)
        state[f"{name}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=own)
    state["base_model.model.classifier.weight"] = torch.randn(6, 64, generator=own)
    return state


def fresh_adapter() -> State:
    """The adapter that they began with: B = 0."""
    state = lora_state(0, apart=0.0)
    return {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in state.items()}


def fisher_of(state: Mapping[str, torch.Tensor], seed: int, *, without: str = "") -> State:
    """Squares of numbers that depend on the state's shapes; not for every tensor."""
    generator = torch.Generator().manual_seed(seed + 50)
    return {
        name: torch.randn(tensor.shape, generator=generator) ** 2 * 1e-8
        for name, tensor in state.items()
        if tensor.is_floating_point() and name not in (without, "head.weight")
    }


@dataclass(frozen=True)
class Case:
    """One merge, to be done in one process and on several ranks."""

    options: Mapping[str, Any]
    make: Callable[[int], State] = full_state
    weights: tuple[float, ...] = (0.5, 0.1, 0.1, 0.1, 0.2)
    base: Callable[[], State] | None = None
    adapter: Mapping[str, Any] | None = None
    fisher: bool = False

    def contribution(self, number: int) -> Contribution:
        state = self.make(number)
        fisher = (
            fisher_of(state, number, without="layer.0.bias" if number == 1 else "") if self.fisher else None
        )
        return Contribution(
            participant=PARTICIPANTS[number], state=state, weight=self.weights[number], fisher=fisher
        )

    def coordinator_options(self) -> dict[str, Any]:
        from peft import LoraConfig  # takes seconds

        return {
            "base": None if self.base is None else self.base(),
            "adapter_config": None if self.adapter is None else LoraConfig(**self.adapter),
            "seed": 3,
            "participants": PARTICIPANTS,
        }


def bfloat16_state(seed: int) -> State:
    return full_state(seed, torch.bfloat16)


def first_state() -> State:
    return full_state(99)


def algorithm(name: str, **parameters: Any) -> dict[str, Any]:
    return {"merge_algorithm": name, "merge_parameters": parameters}


TWO = (0.4, 0.6, 0.0, 0.0, 0.0)
LORA = {"r": 4}
CASES = {
    "linear": Case(algorithm("linear")),
    "linear-thirds": Case(algorithm("linear"), weights=(1 / 3, 0.0, 1 / 3, 0.0, 1 / 3)),
    "linear-bfloat16": Case(algorithm("linear"), make=bfloat16_state),
    "alone": Case(algorithm("ties", density=0.1), weights=(0.0, 1.0, 0.0, 0.0, 0.0), base=first_state),
    "task_arithmetic": Case(algorithm("task_arithmetic"), base=first_state),
    "ties": Case(algorithm("ties", density=0.3), base=first_state),
    "dare_ties": Case(algorithm("dare_ties", density=0.5), base=first_state),
    "slerp": Case(algorithm("slerp"), weights=TWO),
    "karcher": Case(algorithm("karcher")),
    "fisher_simple": Case(algorithm("fisher_simple"), base=first_state),
    "model_stock": Case(algorithm("model_stock"), base=first_state),
    "fisher": Case(algorithm("fisher_dataset"), fisher=True),
    "fisher-tensor": Case(algorithm("fisher_dataset", fisher_normalize="tensor"), fisher=True),
    "from_optimizer": Case(algorithm("from_optimizer", fisher_floor=0.5), fisher=True),
    "tied-fisher": Case(algorithm("fisher_dataset"), make=tied_state, fisher=True),
    "tied-dare": Case(algorithm("dare_linear", density=0.5), make=tied_state, base=lambda: tied_state(99)),
    "lora-products": Case(algorithm("linear"), make=lora_state, adapter=LORA),
    "lora-factors": Case({"lora_merge": "factors"}, make=lora_state, adapter=LORA),
    "lora-ties": Case(algorithm("ties", density=0.5), make=lora_state, adapter=LORA, base=fresh_adapter),
    "lora-fisher": Case(algorithm("fisher_dataset"), make=lora_state, adapter=LORA, fisher=True),
}
EACH_WEIGHTS = {
    "en-US": {"en-US": 0.6, "fr-FR": 0.4},
    "fr-FR": {"en-US": 0.2, "fr-FR": 0.5, "ja-JP": 0.3},
    "ja-JP": {"ja-JP": 1.0, "sq-AL": 0.0},
}
