"""What GPUs can do at most, from their makers' data sheets: the denominator of MFU."""

import re

PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"B200", 2250.0, "NVIDIA DGX B200 data sheet: 36 PFLOP/s sparse over 8 GPUs, half of it dense"),
    (r"H200", 989.5, "NVIDIA H200 data sheet: 1979 TFLOP/s sparse, half of it dense"),
    (r"H100 PCIe", 756.5, "NVIDIA H100 data sheet: 1513 TFLOP/s sparse, half of it dense"),
    (r"H100", 989.5, "NVIDIA H100 data sheet, SXM: 1979 TFLOP/s sparse, half of it dense"),
    (r"A100", 312.0, "NVIDIA A100 data sheet"),
    (r"A40\b", 149.7, "NVIDIA A40 data sheet"),
    (r"A10\b", 125.0, "NVIDIA A10 data sheet"),
    (r"L40S", 362.05, "NVIDIA L40S data sheet: 733 sparse in the table, 362.05 dense"),
    (r"L4\b", 121.0, "NVIDIA L4 data sheet: 242 TFLOP/s sparse, half of it dense"),
    (r"RTX 4090", 165.2, "NVIDIA Ada architecture paper, fp32 accumulation"),
    (r"RTX 3090(?! Ti)", 71.0, "NVIDIA Ampere GA102 architecture paper, fp32 accumulation"),
)
"""Pattern of the name, dense bf16 TFLOP/s, source. The first that fits counts."""


def peak_tflops_of(name: str) -> tuple[float, str] | None:
    """Dense bf16 TFLOP/s of a GPU and where the figure is from; None for one that is not in the table, and for a slice
    of one."""
    if "MIG" in name:
        return None
    for pattern, peak, source in PEAKS:
        if re.search(pattern, name):
            return peak, source
    return None
