"""A greedy answer as a client reads it, to compare weights by."""

import json

import aiohttp


async def streamed_answer(session: aiohttp.ClientSession, url: str, index: int, *, max_tokens: int) -> str:
    """Return what a server answers to the question of this number, streamed to its whole length."""
    body = {"messages": [{"role": "user", "content": f"Tell me about the number {index}"}], "max_tokens": max_tokens,
            "temperature": 0, "ignore_eos": True, "stream": True}  # fmt: skip
    async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        lines = [line[6:].strip() async for line in reply.content if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert choices[-1]["finish_reason"] == "length"
    return "".join(choice["delta"].get("content") or "" for choice in choices)
