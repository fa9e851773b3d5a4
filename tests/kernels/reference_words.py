"""What reference packers of each 4-bit format wrote (AutoAWQ, GPTQModel, compressed-tensors, LMDeploy), as tensors."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_FIXTURE = Path(__file__).parents[3] / "shared" / "fixtures" / "quant_formats.json"


@cache
def read_formats() -> dict[str, Any]:
    """Return the recorded weights and words by format; skip the test where they are not beside this checkout."""
    if not _FIXTURE.is_file():
        pytest.skip("the shared fixtures are not beside this checkout")
    return json.loads(_FIXTURE.read_text())


def words(values: list[list[str]]) -> torch.Tensor:
    """Return rows of 32-bit words in hexadecimal as int32."""
    return torch.from_numpy(
        np.array([[int(word, 16) for word in row] for row in values], dtype=np.uint32).view(np.int32)
    )


def fp16(values: list[list[str]]) -> torch.Tensor:
    """Return rows of 16-bit words in hexadecimal as the numbers they are."""
    return torch.from_numpy(
        np.array([[int(word, 16) for word in row] for row in values], dtype=np.uint16).view(np.float16)
    )
