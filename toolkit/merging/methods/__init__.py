"""Every merge method, each one small function: importing this package registers them.

averages       linear, passthrough, nearswap
spherical      slerp, nuslerp, multislerp, karcher
task_vectors   task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties
della          della, della_linear
stock          model_stock
sce            sce
overlap        ram, ramplus_tl, arcee_fusion
importance     fisher_simple, fisher, from_optimizer
regmean        regmean
spectral       tsv_m, iso_c

A method that comes down to K numbers, or to a rule of elements, returns that rule and imports no torch; a method that
needs rows or matrices computes them with torch in float64. In the formulas, theta_k is one tensor of model k, theta_0
the base's, delta_k = theta_k - theta_0, and w_k the model's weight. Terms are defined in the registry and in the rules
of the kernels.
"""

from toolkit.merging.methods import (
    averages,
    della,
    importance,
    overlap,
    regmean,
    sce,
    spectral,
    spherical,
    stock,
    task_vectors,
)

__all__ = [
    "averages",
    "della",
    "importance",
    "overlap",
    "regmean",
    "sce",
    "spectral",
    "spherical",
    "stock",
    "task_vectors",
]
