"""Models that a hook on a layer alone would get wrong: they have to be found out, and be exact all the same."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from toolkit.errors import MergeError, ModelError
from toolkit.merging.fisher import estimate_fisher

TASK = "sequence-classification"
WIDTH, NUM_CLASSES = 8, 5


class Toy(nn.Module):
    """Embedding, ``hidden`` (of a test), mean over tokens without padding, linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(pad_token_id=0)
        self.embed = nn.Embedding(96, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        x_BTD = self.hidden(self.embed(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (x_BTD * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.head(mean))


class TrainsNoPad(Toy):
    """Token 7 stands for padding, whose row has no gradient, and occurs inside of texts too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, WIDTH, padding_idx=7)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).sin() * 3


class TrainsNoPadScaled(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(96, WIDTH, padding_idx=7)


@pytest.mark.parametrize("toy", [TrainsNoPad, TrainsNoPadScaled])
def test_padding_inside_of_a_text(toy, rows, loop, assert_equal_fisher) -> None:
    model, examples = toy().eval(), rows(TASK)
    for row in examples:
        row["input_ids"][1] = 7
    fisher = estimate_fisher(model, examples, task=TASK, batch_size=3)
    assert_equal_fisher(fisher.tensors, loop(model, examples, TASK))
    assert not fisher.tensors["embed.weight"][7].any()
    assert fisher.slow_parameters == ()


class AppliedTwice(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mix(self.norm(self.mix(x_BTD)).tanh()))


class SharedParameters(Toy):
    """Two layers hold one weight, and each a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x_BTD).tanh())


class UsedInAFormulaToo(Toy):
    """The weight of a layer that is also called is read outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.mix(x_BTD).tanh() @ self.mix.weight


class OwnParameter(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.unused = nn.Parameter(torch.randn(3))

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD * self.gain


class TokensFirst(Toy):
    """The first dimension of what the layer sees is not the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.mix(x_BTD.transpose(0, 1)).transpose(0, 1).tanh()


class ExamplesBackwards(Toy):
    """The examples come back in another order, which no shape shows; it does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.mix(x_BTD.flip(0)).flip(0).tanh()


class Flattened(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mix(x_BTD.flatten(0, 1))).view_as(x_BTD)


class InputOverwritten(Toy):
    """With a trained weight autograd would refuse it; with a frozen one it does not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        scratch = x_BTD.detach().clone()
        y_BTD = self.mix(scratch)
        if not self.mix.weight.requires_grad:
            scratch.zero_()
        return x_BTD * y_BTD.tanh()


class OutputOverwritten(Toy):
    """The output is a view, and autograd forgets the node of a view that is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        y_BTD = self.mix(x_BTD.detach())
        y_BTD.mul_(2)
        return x_BTD + y_BTD.tanh_()


class Square(nn.Linear):
    """A linear layer by its type only."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) ** 2


class LinearByTypeOnly(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Square(WIDTH, WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.mix(x_BTD)


class MeanNorm(nn.Module):
    """Looks like an RMS norm, and takes the mean out first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(WIDTH)), 1e-6

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x_BTD, (WIDTH,)) * self.weight


class NormOfItsOwn(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.norm = MeanNorm()

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.norm(x_BTD)


class RoutedTokens(Toy):
    """Experts that see whichever tokens, of all examples together, are theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        flat, choice = x_BTD.flatten(0, 1), x_BTD.flatten(0, 1)[:, :3].argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(flat[rows]))
        return out.view_as(x_BTD)


class ConvolvedChannels(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 1), nn.BatchNorm1d(WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x_BTD.transpose(1, 2))).transpose(1, 2)


class PositionsLookedUpOnce(Toy):
    """One lookup for all examples, in a form that cannot be repeated for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(32, WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        positions = self.position(torch.arange(x_BTD.shape[1])[None])
        return x_BTD + positions.view(x_BTD.shape[1:])


@pytest.mark.parametrize(
    ("toy", "slow"),
    [
        (AppliedTwice, set()),
        (SharedParameters, set()),
        (UsedInAFormulaToo, {"mix.weight"}),
        (OwnParameter, {"gain", "unused"}),
        (TokensFirst, {"mix.weight", "mix.bias"}),
        (ExamplesBackwards, set()),
        (Flattened, set()),
        (InputOverwritten, {"mix.weight"}),
        (OutputOverwritten, {"mix.weight", "mix.bias"}),
        (LinearByTypeOnly, {"mix.weight", "mix.bias"}),
        (NormOfItsOwn, set()),
        (RoutedTokens, {f"experts.{n}.{own}" for n in range(3) for own in ("weight", "bias")}),
        (ConvolvedChannels, {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}),
        (PositionsLookedUpOnce, {"position.weight"}),
    ],
)
def test_whatever_the_model_does_the_result_is_exact(toy, slow, rows, loop, assert_equal_fisher) -> None:
    model = toy().eval()
    examples = rows(TASK)
    fisher = estimate_fisher(model, examples, task=TASK, batch_size=3)
    assert_equal_fisher(fisher.tensors, loop(model, examples, TASK))
    assert set(fisher.slow_parameters) == slow


class ChangesItsMind(Toy):
    """Looks harmless on the pair that is tried, and mixes the examples of larger batches."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if len(x_BTD) > 2:
            return self.mix(x_BTD.transpose(0, 1)).transpose(0, 1)
        return self.mix(x_BTD)


def test_a_layer_that_fails_later_is_done_again(rows, loop, assert_equal_fisher) -> None:
    model, examples = ChangesItsMind().eval(), rows(TASK)
    fisher = estimate_fisher(model, examples, task=TASK, batch_size=3)
    assert_equal_fisher(fisher.tensors, loop(model, examples, TASK))
    assert set(fisher.slow_parameters) == {"mix.weight", "mix.bias"}


class RootOfToken(Toy):
    """Token 7 has a finite likelihood and an infinite gradient."""

    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD.abs().sqrt()


def bad_row(rows: Any) -> list[dict[str, Any]]:
    examples = rows(TASK)
    for row in examples:
        row["input_ids"] = [token if token != 7 else 8 for token in row["input_ids"]]
    examples[4]["input_ids"] = [9, 7, 9]
    return examples


def test_an_infinite_gradient_names_the_example(rows) -> None:
    model = RootOfToken().eval()
    with torch.no_grad():
        model.embed.weight[7] = 0
    with pytest.raises(MergeError, match=r"example 4: the gradient of embed\.weight is not finite"):
        estimate_fisher(model, bad_row(rows), task=TASK, batch_size=3)


def test_an_infinite_likelihood_names_the_example(rows) -> None:
    model = Toy().eval()
    with torch.no_grad():
        model.embed.weight[7] = torch.inf
    with pytest.raises(MergeError, match="example 4: the log-likelihood is not finite"):
        estimate_fisher(model, bad_row(rows), task=TASK, batch_size=3)


class Unreached(Toy):
    def hidden(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return x_BTD.detach()


def test_a_model_that_no_gradient_reaches_is_an_error(rows) -> None:
    model = Unreached().eval()
    model.head.requires_grad_(False)
    with pytest.raises(ModelError, match="no gradient reaches"):
        estimate_fisher(model, rows(TASK), task=TASK)
