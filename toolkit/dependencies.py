"""Optional packages: whether one is installed, without importing it."""

import importlib.util


def is_installed(module: str) -> bool:
    """Whether a package can be imported; a mere folder of that name (W&B makes one) does not count."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None
