"""Before any test imports torch, it is set up as in the server."""

from lmdserve.engine.torch_setup import prepare_torch

prepare_torch()
