"""Keep libraries from talking over the run: what they log at import time is about parts that meldkit does not use."""

import logging
import os
import warnings

_TALKATIVE = {
    "bitsandbytes": logging.ERROR,  # a hub kernel for 4-bit products on CPUs that it cannot load
    "torchao": logging.ERROR,  # its compiled parts of other builds
    "torch.utils._pytree": logging.ERROR,
    "transformers": logging.ERROR,
    "trl": logging.ERROR,
    "accelerate": logging.ERROR,
    "peft": logging.ERROR,
    "datasets": logging.ERROR,
    "DeepSpeed": logging.ERROR,
}


def quiet_libraries(log_level: str) -> None:
    """Show only the errors of the libraries under us, or everything with ``DEBUG``. Before they are imported."""
    if log_level == "DEBUG":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name, level in _TALKATIVE.items():
        logging.getLogger(name).setLevel(level)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|torch)\b"
    )
    warnings.filterwarnings(
        "ignore", category=DeprecationWarning, module=r"(transformers|trl|peft|accelerate|torch)\b"
    )
