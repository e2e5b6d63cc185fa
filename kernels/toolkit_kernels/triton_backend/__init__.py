"""Kernels for CUDA, written in Triton: one launch for a whole state dict.

numbers      elements of any dtype as float64 and back, random words
rows         what a launch knows: its variant, and a row of numbers for each tensor
elementwise  the rules
reductions   sums of products, histograms, counts, squares
launch       from pieces to launches
backend      the contract
"""

from toolkit_kernels.backend import Backend
from toolkit_kernels.triton_backend.backend import TritonBackend


def make() -> Backend:
    return TritonBackend()
