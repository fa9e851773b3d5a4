"""Where a kernel's tests run, and how.

A test takes the `device` fixture, makes its tensors there and calls the launcher: on a machine without a GPU the device
is the CPU and the kernel is interpreted (tests/conftest.py sets TRITON_INTERPRET before triton is imported), with a GPU
the same test runs the compiled kernel. Whether kernels compile for every architecture, without spills and within shared
memory, is asked of `offline_compile`, whose workers never interpret.
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the device that kernels run on in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
