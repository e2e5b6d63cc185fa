"""Weights that follow from the languages alone."""

from collections.abc import Mapping

import numpy as np

from toolkit.errors import InputError
from toolkit.languages import similarity_matrix
from toolkit.rounds.weighting.registry import WeightingFields, WeightingInputs, weighting


@weighting("similarity")
def similarity(inputs: WeightingInputs) -> Mapping[str, float]:
    """Each source by the similarity of its language to the target's (URIEL).

    n_k = s(target, k), with s of ``toolkit.languages`` over ``similarity_features``. ``similarity_measure: shifted``
    takes (s + 1) / 2 instead. ``similarity_top_k`` keeps the k sources that are most similar to the target (the target
    itself is the first of them where it merges; of equal ones the first given stay) and gives the others zero.

    ``similarity_sinkhorn: t`` balances first. The matrix has a row for every source and the target and a column for
    every source, each row cut to its own top k; t times, each column is divided by its sum, then each row. A source
    that is near to everything no longer has the largest weight everywhere.

    Source: R. Sinkhorn, P. Knopp, Concerning nonnegative matrices and doubly stochastic matrices (1967).
    """
    options: WeightingFields = inputs.options
    rows = list(dict.fromkeys([*inputs.sources, inputs.target]))
    alike = similarity_matrix(rows, options.similarity_features)[:, : len(inputs.sources)]
    if options.similarity_measure == "shifted":
        alike = (alike + 1) / 2
    elif options.similarity_measure != "cosine":
        raise InputError(f"unknown similarity measure '{options.similarity_measure}': cosine or shifted")
    if options.similarity_top_k is not None:
        alike = top_k(alike, options.similarity_top_k)
    if options.similarity_sinkhorn:
        alike = sinkhorn(alike, options.similarity_sinkhorn)
    weights = alike[rows.index(inputs.target)]
    if not weights.any():
        raise InputError(
            f"similarity weights: {options.similarity_features} finds nothing in common between"
            f" {inputs.target} and {', '.join(inputs.sources)}",
            hint="--similarity-features syntax_knn, or --similarity-measure shifted",
        )
    return dict(zip(inputs.sources, weights.tolist(), strict=True))


def top_k(alike: np.ndarray, k: int) -> np.ndarray:
    """``alike`` with all but the k largest values of each row set to zero.

    A language's own column (its number is the row's) comes first; of other equal ones the first stay.

    Args:
        alike: [R, C] float64, R >= C.
        k: at least 1; a k of C or more keeps everything.
    """
    if k < 1:
        raise InputError(f"similarity_top_k is {k}; at least 1")
    order = alike.copy()
    np.fill_diagonal(order, np.inf)
    ranks = np.argsort(np.argsort(-order, axis=1, kind="stable"), axis=1)
    return np.where(ranks < k, alike, 0.0)


def sinkhorn(alike: np.ndarray, num_iterations: int) -> np.ndarray:
    """``alike`` scaled toward rows of sum 1 and columns of one sum; rows are exact, they come last.

    Args:
        alike: [R, C] float64, zero or more, R >= C, no row or column of zeros only.
        num_iterations: of columns and rows.
    """
    for _ in range(num_iterations):
        alike = alike / alike.sum(axis=0, keepdims=True)
        alike = alike / alike.sum(axis=1, keepdims=True)
    return alike
