"""What an estimate leaves of the process's threads."""

import subprocess
import sys

FIRST_CALL = """
import torch
from toolkit.merging.fisher.compiled import add_product_squares
torch.get_num_threads()  # from here on torch asks OpenMP
torch.set_num_threads(1)
add_product_squares(torch.zeros(64, 64), torch.randn(2, 8, 64), torch.randn(2, 8, 64), [(0, 8), (0, 8)])
print(torch.get_num_threads())
"""


def test_torch_keeps_its_number_of_threads():
    """numba's first parallel call sets OpenMP's, which is torch's: in a process that has made none before."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
