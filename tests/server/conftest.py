"""The application under test: the real text side over a byte-level toy tokenizer, on a fake engine, on a real port."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from server_fakes import FakeEngine, running
from toy_models import TOY_MODELS

from lmdserve.server.model import ServedModel, load_served_model


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the InternLM2 family without weights."""
    return TOY_MODELS["internlm2"].write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def model(model_folder: Path) -> ServedModel:
    return load_served_model(model_folder, name="toy", chat_template=None)


@pytest.fixture
async def url(engine: FakeEngine, model: ServedModel) -> AsyncIterator[str]:
    async with running(engine, model) as address:
        yield address


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client:
        yield client
