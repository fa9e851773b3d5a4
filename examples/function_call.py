"""Let the model call functions until it has what it needs: (3+5)*2 takes `add`, then `mul`."""

import json
import os

from openai import OpenAI

functions = {"add": (lambda a, b: a + b, "+"), "mul": (lambda a, b: a * b, "*")}
numbers = {"type": "object", "properties": {name: {"type": "int"} for name in ("a", "b")}, "required": ["a", "b"]}
about = {"add": "Compute the sum of two numbers", "mul": "Compute the product of two numbers"}
tools = [
    {"type": "function", "function": {"name": name, "description": text, "parameters": numbers}}
    for name, text in about.items()
]
client = OpenAI(base_url=os.getenv("OPENAI_BASE_URL", "http://127.0.0.1:23333/v1"), api_key="none needed")
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "Compute (3+5)*2"}]
for _ in functions:
    message = client.chat.completions.create(model=model, messages=messages, tools=tools).choices[0].message
    call = message.tool_calls[0].function
    (function, sign), operands = functions[call.name], json.loads(call.arguments)
    result = f"{operands['a']}{sign}{operands['b']}={function(**operands)}"
    print(f"{call.name}({call.arguments}): {result}")
    messages += [message, {"role": "environment", "content": result, "name": "plugin"}]
