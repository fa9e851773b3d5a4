"""Chat through the OpenAI SDK: one system message, one question, the whole answer at once."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.getenv("OPENAI_BASE_URL", "http://127.0.0.1:23333/v1"), api_key="none needed")
model = client.models.list().data[0].id
reply = client.chat.completions.create(
    model=model,
    messages=[
        {"role": "system", "content": "你是一个友好的小助手，负责解决问题."},
        {"role": "user", "content": "帮我讲述一个关于狐狸和西瓜的小故事"},
    ],
    temperature=0.8,
    top_p=0.8,
)
print(reply.choices[0].message.content)
print(reply.usage)
