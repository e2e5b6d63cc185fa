"""The valid name that a wrong one most likely meant."""

import difflib
from collections.abc import Iterable

SIMILARITY = 0.6
TYPING_SLIP = 0.8


def plain(name: str) -> str:
    """``--Max-Epochs`` and ``MAX_EPOCHS`` as ``max_epochs``."""
    return name.strip().lstrip("-").replace("-", "_").lower()


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the name in ``valid`` that is closest to ``name``, or None when nothing is close.

    Dashes, underscores and case do not count. A slip of the keyboard comes first, then the first name that
    begins with ``name``, then a name that is less close, then the words of ``name`` in another order or
    beside others.
    """
    candidates = {plain(candidate): candidate for candidate in valid}
    wanted = plain(name)
    if wanted in candidates:
        return candidates[wanted]
    matches = difflib.get_close_matches(wanted, candidates, n=1, cutoff=SIMILARITY)
    if matches and difflib.SequenceMatcher(None, wanted, matches[0]).ratio() >= TYPING_SLIP:
        return candidates[matches[0]]
    if len(wanted) >= 3:
        beginning = next((c for c in candidates if c.startswith(wanted)), None)
        if beginning is not None:
            return candidates[beginning]
    if matches:
        return candidates[matches[0]]
    words = set(wanted.split("_"))
    sharing = [c for c in candidates if words == set(c.split("_"))]
    sharing = sharing or [c for c in candidates if len(wanted) >= 3 and words <= set(c.split("_"))]
    return candidates[sharing[0]] if len(sharing) == 1 else None


def did_you_mean(name: str, valid: Iterable[str], *, prefix: str = "") -> str:
    """Return ``"; did you mean '...'?"``, or nothing when no valid name is close."""
    match = nearest(name, valid)
    return f"; did you mean '{prefix}{match}'?" if match else ""
