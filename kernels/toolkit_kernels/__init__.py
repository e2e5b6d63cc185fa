"""Kernels of the merge engine: an fp64 reference, a torch and a Triton implementation of each merge rule."""
