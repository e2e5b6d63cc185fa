"""Kernels of the merge engine: each rule as an fp64 reference, for torch, numba and Triton, behind one dispatch.

spans      memory of any dtype on any device
rules      what can be computed: weighted sum, Fisher mean, consensus of sparse deltas, near swap
backend    the contract of a backend
dispatch   backend("auto"), available()
sums       sums of products and exact sets of largest elements over a tensor in pieces
pool       threads over pieces
"""
