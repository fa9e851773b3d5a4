"""The application under test: the real text side over a byte-level toy tokenizer, on a fake engine, on a real port."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from server_fakes import CONTROL_IDS, FakeEngine, running
from tokenizers.pre_tokenizers import ByteLevel

from lmdserve.server.model import ServedModel, load_served_model


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the InternLM2 family without weights."""
    folder = tmp_path_factory.mktemp("toy")
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    added = [{"id": token_id, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for text, token_id in CONTROL_IDS.items()]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
                 "model": {"type": "BPE", "vocab": vocab, "merges": []}}  # fmt: skip
    tokenizer_config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
                        "added_tokens_decoder": {str(token["id"]): token for token in added}}  # fmt: skip
    for name, value in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", {"model_type": "internlm2"}),
        ("generation_config.json", {"temperature": 0.75, "top_k": 40}),
    ):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


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


def _byte_characters() -> list[str]:
    """Return the character that byte-level BPE writes for each byte, 0 to 255."""
    alphabet = set(ByteLevel.alphabet())
    shown = [byte for byte in range(256) if chr(byte) in alphabet]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
