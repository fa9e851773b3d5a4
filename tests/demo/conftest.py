"""What the tests of the demo model share: its folder and its tokenizer."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

import lmdserve.demo

MODEL_FOLDER = Path(lmdserve.demo.__file__).parent / "model"


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return MODEL_FOLDER


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
