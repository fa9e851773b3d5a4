"""Ask many questions at once: the server answers them in one batch."""

import asyncio
import os

from openai import AsyncOpenAI

TOPICS = ["time management", "sleep", "learning a language", "cooking"]


async def main() -> None:
    client = AsyncOpenAI(base_url=os.getenv("OPENAI_BASE_URL", "http://127.0.0.1:23333/v1"), api_key="none needed")
    model = (await client.models.list()).data[0].id

    async def suggest(topic: str) -> str:
        question = {"role": "user", "content": f"Give me three suggestions on {topic}"}
        reply = await client.chat.completions.create(model=model, messages=[question], max_tokens=200)
        return reply.choices[0].message.content or ""

    for topic, answer in zip(TOPICS, await asyncio.gather(*map(suggest, TOPICS)), strict=True):
        print(f"# {topic}\n{answer}\n")


asyncio.run(main())
