"""The random number generators of a process, taken and put back as one value."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class RngState:
    """States of Python's, NumPy's, torch's CPU generator and those of all CUDA devices."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]


def capture() -> RngState:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return RngState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def restore(state: RngState) -> None:
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)
