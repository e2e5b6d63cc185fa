"""The backend that always works: eager torch, in chunks whose scratch stays in the second-level cache.

memory        spans as tensors, chunks, the scratch of each thread
elementwise   the rules that write a tensor
masks         which elements of a delta stay; Philox in int64
reductions    sums of products, histograms, positions, counts
backend       make()

How the bits stay those of the reference: every operation reads and writes one dtype, with ``copy_`` between dtypes
(exact upwards, to nearest even downwards); multiplication and addition are separate calls, never ``addcmul_`` or
``add_(alpha=...)``, whose vectorised code may fuse them; nothing is divided by a Python number, which CUDA replaces by
a product with the reciprocal.

How torch's own threads stay out: on a CPU a chunk has fewer elements than the 32,768 from which torch divides an
operation among its threads (``at::internal::GRAIN_SIZE``). So every call runs in the thread that makes it, next to as
many others as there are, and nobody's ``torch.set_num_threads`` is read or changed.
"""

from toolkit_kernels.torch_backend.backend import TorchBackend, make

__all__ = ["TorchBackend", "make"]
