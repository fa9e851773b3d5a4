"""Let the model call Python functions until it answers: their schemas come from signatures and docstrings."""

import asyncio
import os

from lmdserve.clients.agent import run_agent
from lmdserve.clients.http import AsyncClient


def add(a: int, b: int) -> int:
    """Compute the sum of two numbers"""
    return a + b


def mul(a: int, b: int) -> int:
    """Compute the product of two numbers"""
    return a * b


async def main() -> None:
    async with AsyncClient(os.getenv("OPENAI_BASE_URL", "http://127.0.0.1:23333")) as client:
        run = await run_agent(client, "Compute (3+5)*2", [add, mul], on_message=print)
    print(run.answer)


asyncio.run(main())
