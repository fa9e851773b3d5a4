"""Before any test imports torch, it is set up as in the server; without a GPU, Triton's kernels are interpreted.

Triton reads TRITON_INTERPRET when it is imported and when a kernel's module is, so the choice is made here, once for
the whole test process. With a GPU nothing is switched: kernels are compiled, and those of tests/kernels run on the GPU.
"""

import os

from lmdserve.engine.torch_setup import prepare_torch

prepare_torch()

import torch  # noqa: E402  (after prepare_torch)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
