"""Weights that follow from what the participants' models can do."""

from collections.abc import Mapping

from toolkit.errors import InputError
from toolkit.rounds.weighting.registry import WeightingInputs, weighting


@weighting("performance", needs_accuracy=True)
def performance(inputs: WeightingInputs) -> Mapping[str, float]:
    """Each source by what its model reaches on the target's held-out rows.

    The column of the target in the cross-lingual matrix accuracy[source][target], not a source's row: what a source can
    do elsewhere says nothing about the target. Where no source reaches anything yet, all weigh the same.
    """
    if inputs.accuracy is None:
        raise InputError(f"performance weights for {inputs.target}: nothing was measured")
    missing = [s for s in inputs.sources if inputs.target not in inputs.accuracy.get(s, {})]
    if missing:
        raise InputError(
            f"performance weights: {', '.join(missing)} not measured on held-out rows of {inputs.target}",
            hint=f"does {inputs.target} have held-out rows? similarity and average weights need none",
        )
    reached = {source: inputs.accuracy[source][inputs.target] for source in inputs.sources}
    return reached if any(reached.values()) else dict.fromkeys(reached, 1.0)
