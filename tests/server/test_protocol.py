"""Bad input, row by row: its status, and the field it is blamed on. And what must be accepted although it looks odd."""

import io
import json
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_fakes import VOCAB_SIZE, FakeEngine, chat_body

from lmdserve.server import parsing

JSON = "application/json"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def user(content: Any = "Hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def messages(*extra: Any) -> dict[str, Any]:
    return {"messages": [user(), *extra]}


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": None}, "messages"),
    (messages("Hi"), "messages[1]"),
    (messages({"content": "x"}), "messages[1].role"),
    (messages({"role": "robot", "content": "x"}), "messages[1].role"),
    (messages({"role": "user"}), "messages[1].content"),
    (messages({"role": "assistant", "content": None}), "messages[1].content"),
    (messages({"role": "system", "content": None}), "messages[1].content"),
    (messages(user(5)), "messages[1].content"),
    (messages(user([{"type": "text"}])), "messages[1].content[0].text"),
    (messages(user([{"type": "text", "text": "a"}, IMAGE])), "messages[1].content[1].type"),
    (messages(user(["text"])), "messages[1].content[0]"),
    (messages(user() | {"tool_calls": [CALL]}), "messages[1].tool_calls"),
    (messages({"role": "assistant", "tool_calls": [{"id": "x"}]}), "messages[1].tool_calls[0].function"),
    (messages({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}), "messages[1].tool_calls[0].type"),
    (messages({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}),
     "messages[1].tool_calls[0].function.arguments"),
    (messages({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}),
     "messages[1].tool_calls[0].function.arguments"),
    (messages({"role": "assistant", "content": "", "function_call": {"name": "f"}}), "messages[1].function_call"),
    (messages({"role": "assistant", "content": "", "audio": {"id": "a"}}), "messages[1].audio"),
    (chat_body(model="other"), "model"),
    (chat_body(model=5), "model"),
    (chat_body(temperature=-0.1), "temperature"),
    (chat_body(temperature=2.1), "temperature"),
    (chat_body(temperature="hot"), "temperature"),
    (chat_body(top_p=0), "top_p"),
    (chat_body(top_p=1.01), "top_p"),
    (chat_body(top_k=-2), "top_k"),
    (chat_body(top_k=1.5), "top_k"),
    (chat_body(min_p=1.5), "min_p"),
    (chat_body(seed=2**63), "seed"),
    (chat_body(seed=10**40), "seed"),
    (chat_body(seed="abc"), "seed"),
    (chat_body(repetition_penalty=0), "repetition_penalty"),
    (chat_body(presence_penalty=2.5), "presence_penalty"),
    (chat_body(frequency_penalty=-2.5), "frequency_penalty"),
    (chat_body(logit_bias={"x": 1}), "logit_bias"),
    (chat_body(logit_bias={"²": 1}), "logit_bias"),
    (chat_body(logit_bias={"1": 101}), "logit_bias"),
    (chat_body(logit_bias={str(VOCAB_SIZE): 1}), "logit_bias"),
    (chat_body(logit_bias=[1]), "logit_bias"),
    (chat_body(stop=5), "stop"),
    (chat_body(stop=""), "stop"),
    (chat_body(stop=["a", ""]), "stop[1]"),
    (chat_body(stop=["a"] * 17), "stop"),
    (chat_body(stop_token_ids=[-1]), "stop_token_ids[0]"),
    (chat_body(stop_token_ids=[1, VOCAB_SIZE]), "stop_token_ids[1]"),
    (chat_body(ignore_eos=1), "ignore_eos"),
    (chat_body(min_tokens=-1), "min_tokens"),
    (chat_body(min_tokens=5, max_tokens=4), "min_tokens"),
    (chat_body(min_tokens=5, min_new_tokens=6), "min_new_tokens"),
    (chat_body(max_tokens=0), "max_tokens"),
    (chat_body(max_tokens=1, max_completion_tokens=2), "max_tokens"),
    (chat_body(max_completion_tokens="1"), "max_completion_tokens"),
    (chat_body(n=0), "n"),
    (chat_body(n=129), "n"),
    (chat_body(n=True), "n"),
    (chat_body(logprobs=3), "logprobs"),
    (chat_body(top_logprobs=3), "top_logprobs"),
    (chat_body(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat_body(stream="yes"), "stream"),
    (chat_body(stream_options={"include_usage": True}), "stream_options"),
    (chat_body(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (chat_body(tools={}), "tools"),
    (chat_body(tools=[{"type": "function", "function": {}}]), "tools[0].function.name"),
    (chat_body(tools=[{"type": "web_search"}]), "tools[0].type"),
    (chat_body(tool_choice="required"), "tool_choice"),
    (chat_body(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice"),
    (chat_body(tool_choice={"type": "allowed_tools"}), "tool_choice"),
    (chat_body(tool_choice="sometimes"), "tool_choice"),
    (chat_body(tool_choice={}), "tool_choice"),
    (chat_body(response_format={"type": "json_schema", "json_schema": {}}), "response_format.json_schema.schema"),
    (chat_body(response_format={"type": "json_schema", "json_schema": {"schema": "a"}}),
     "response_format.json_schema.schema"),
    (chat_body(response_format={"type": "structural_tag"}), "response_format.type"),
    (chat_body(response_format={"type": "regex_schema"}), "response_format.regex_schema"),
    (chat_body(response_format={"type": "regex_schema", "regex_schema": "["}), "response_format.regex_schema"),
    (chat_body(response_format={"type": "json_object"}, regex="a"), "regex"),
    (chat_body(regex="(?=a)"), "regex"),
    (chat_body(grammar="start: a"), "grammar"),
    (chat_body(choice=[]), "choice"),
    (chat_body(choice=[""]), "choice"),
    (chat_body(response_format={}), "response_format.type"),
    (chat_body(response_format="json"), "response_format"),
    (chat_body(chat_template_kwargs={"messages": []}), "chat_template_kwargs.messages"),
    (chat_body(chat_template_kwargs={"enable_thinking": True}), "chat_template_kwargs.enable_thinking"),
    (chat_body(continue_final_message=True), "messages[0]"),
    (chat_body(continue_final_message=True, add_generation_prompt=True), "continue_final_message"),
    (chat_body(functions=[{"name": "f"}]), "functions"),
    (chat_body(function_call="auto"), "function_call"),
    (chat_body(modalities=["text", "audio"]), "modalities"),
    (chat_body(reasoning_effort="high"), "reasoning_effort"),
    (chat_body(guided_json="{"), "guided_json"),
    (chat_body(guided_json={"type": "string", "minLength": 2, "maxLength": 1}), "guided_json"),
    (chat_body(structured_outputs={}), "structured_outputs"),
    (chat_body(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs"),
    (chat_body(structured_outputs={"structural_tag": "a"}), "structured_outputs.structural_tag"),
    (chat_body(ebnf="a"), "ebnf"),
    (chat_body(best_of=2), "best_of"),
    (chat_body(use_beam_search=True), "use_beam_search"),
    (chat_body(max_new_tokens=5), "max_new_tokens"),
    (chat_body(echo=True), "echo"),
    (chat_body(cache_salt="x"), "cache_salt"),
    (chat_body(skip_special_tokens=False), "skip_special_tokens"),
    (chat_body(temprature=0.5), "temprature"),
    (chat_body(max_token=5), "max_token"),
    (chat_body(**{f"field_{number}": 1 for number in range(300)}), "body"),
]  # fmt: skip

BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [1, [1]]}, "prompt[1]"),
    ({"prompt": ["a", ["b"]]}, "prompt[1][0]"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [5, -1]}, "prompt[1]"),
    ({"prompt": [5, VOCAB_SIZE]}, "prompt[1]"),
    ({"prompt": [[5], [5, VOCAB_SIZE]]}, "prompt[1][1]"),
    ({"prompt": ["a"] * 100, "n": 3}, "prompt"),
    ({"prompt": "a", "model": "other"}, "model"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1, "echo": True}, "max_tokens"),
    ({"prompt": "a", "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "suffix": "z"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "tools": [CALL]}, "tools"),
    ({"prompt": "a", "messages": [user()]}, "messages"),
    ({"prompt": "a", "response_format": {"type": "json"}}, "response_format.type"),
    ({"prompt": "a", "temperature": 3}, "temperature"),
]

GOOD_CHATS: list[dict[str, Any]] = [
    chat_body(),
    chat_body(model="toy"),
    chat_body(model=None, temperature=None, stop=None, tools=None, n=None, stream=None, seed=None, logprobs=None),
    messages(user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])),
    messages(user("")),
    messages({"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "r"}),
    messages({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1", "content": "r"}),
    messages({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}, user()),
    messages({"role": "assistant", "content": "x"}, {"role": "environment", "name": "plugin", "content": "8"}),
    messages({"role": "assistant", "content": "x", "refusal": None, "audio": None, "function_call": None,
              "annotations": [], "tool_calls": None}),
    {"messages": [{"role": "developer", "content": "Be brief."}, user()]},
    {"messages": [{"role": "system", "content": "Be brief."}, user(), user()]},
    chat_body(temperature=2, top_p=1, top_k=0, min_p=0, presence_penalty=-2, frequency_penalty=2),
    chat_body(stop=[]),
    chat_body(tools=[], tool_choice="auto"),
    chat_body(tool_choice="none"),
    chat_body(tools=[{"type": "function", "function": {"name": "f", "strict": False}}]),
    chat_body(response_format={"type": "text"}),
    chat_body(max_tokens=5, max_completion_tokens=5),
    chat_body(min_new_tokens=2, min_tokens=2),
    chat_body(top_logprobs=0),
    chat_body(seed=-(2**63)),
    chat_body(logit_bias={}),
    chat_body(chat_template_kwargs={}),
    chat_body(user="u", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k"),
    chat_body(best_of=1, use_beam_search=False, modalities=["text"], skip_special_tokens=True, session_id=-1),
    chat_body(functions=None, guided_json=None, reasoning_effort="none"),
    chat_body(my_own_label="x", trace={"id": 1}),
]  # fmt: skip


async def post(session: aiohttp.ClientSession, url: str, data: bytes | io.BytesIO, content_type: str = JSON) -> Any:
    async with session.post(url, data=data, headers={"Content-Type": content_type}) as reply:
        assert reply.content_type == "application/json"
        return reply.status, await reply.json()


@pytest.mark.parametrize(("path", "rows"), [(CHAT, BAD_CHATS), (COMPLETIONS, BAD_COMPLETIONS)])
async def test_bad_fields_are_named(
    session: aiohttp.ClientSession, url: str, engine: FakeEngine, path: str, rows: list[tuple[dict[str, Any], str]]
) -> None:
    for body, param in rows:
        status, reply = await post(session, url + path, json.dumps(body).encode())
        error = reply["error"]
        assert (status, error["param"]) == (404 if param == "model" and body["model"] == "other" else 400, param), body
        assert error["type"] == "invalid_request_error"
        field = param.split("[")[0].split(".")[0]
        assert field in error["message"], error["message"]
    assert engine.requests == []


async def test_odd_but_harmless_requests_are_answered(
    session: aiohttp.ClientSession, url: str, engine: FakeEngine
) -> None:
    for body in GOOD_CHATS:
        status, reply = await post(session, url + CHAT, json.dumps(body).encode())
        assert status == 200, (body, reply)
    assert len(engine.requests) == len(GOOD_CHATS)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "body"),
        (b'{"messages": [{"role": "user", "content": "\\ud800 "}]}', "body"),
        (b"[" * 100_000, "body"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "body"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}', "body"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}", "seed"),
    ],
)
async def test_bodies_that_are_no_json_object(
    session: aiohttp.ClientSession, url: str, data: bytes, param: str
) -> None:
    status, reply = await post(session, url + CHAT, data)
    assert (status, reply["error"]["param"]) == (400, param)


async def test_deep_nesting_anywhere_is_a_client_error(session: aiohttp.ClientSession, url: str) -> None:
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    arguments = json.dumps(deep.decode()).encode()
    for data in (
        b'{"messages": [{"role": "user", "content": "x"}], "metadata": ' + deep + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [' + deep + b"]}",
        b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": ' + deep + b"}",
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '
        + arguments
        + b"}}]}]}",
    ):
        status, reply = await post(session, url + CHAT, data)
        assert status in (200, 400), reply


async def test_a_body_must_say_that_it_is_json(session: aiohttp.ClientSession, url: str) -> None:
    status, reply = await post(session, url + CHAT, b"{}", "application/x-www-form-urlencoded")
    assert (status, reply["error"]["param"]) == (415, "Content-Type")
    assert "application/json" in reply["error"]["message"]
    status, _ = await post(session, url + CHAT, json.dumps(chat_body()).encode(), "application/json; charset=utf-8")
    assert status == 200


async def test_a_body_over_the_limit_is_refused(session: aiohttp.ClientSession, url: str) -> None:
    body = io.BytesIO(b'{"messages": "' + b"x" * (16 * 2**20) + b'"}')
    status, reply = await post(session, url + CHAT, body)
    assert (status, reply["error"]["param"]) == (413, "body")
    assert str(16 * 2**20) in reply["error"]["message"]


@pytest.mark.parametrize(
    ("start", "junk", "param", "limit"),
    [
        (b'{"tools": [', b"{}", "tools", 512 * 1024),
        (b'{"anything": [', b"[]", "anything", 512 * 1024),
        (b'{"messages": [', b"[]", "body", 200_000),
        (b"[[", b"[]", "body", None),
    ],
)
async def test_what_would_take_long_to_read_is_refused_unread(
    session: aiohttp.ClientSession, url: str, start: bytes, junk: bytes, param: str, limit: int | None
) -> None:
    """A body of 3 MB of empty lists held up everybody for a quarter of a second."""
    end = b"]}" if start.startswith(b"{") else b"]]"
    status, reply = await post(session, url + CHAT, start + b",".join([junk] * 250_000) + end)
    assert (status, reply["error"]["param"]) == (400, param)
    assert limit is None or str(limit) in reply["error"]["message"]


async def test_a_long_text_full_of_brackets_is_read(session: aiohttp.ClientSession, url: str) -> None:
    text = r"""if (a[i] == "\"" || a[i] == "[\\") { b[i] = a[i]; }""" * 60_000
    body = io.BytesIO(json.dumps(chat_body(messages=[user(text)])).encode())
    status, reply = await post(session, url + CHAT, body)
    assert status == 200 or reply["error"]["code"] == "context_length_exceeded"


def _containers_in(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_containers_in, value.values()))
    return 1 + sum(map(_containers_in, value)) if isinstance(value, list) else 0


_TEXTS = st.text('[]{}"\\a,', max_size=6)


@given(
    value=st.recursive(_TEXTS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(_TEXTS, inner)),
    piece=st.integers(1, 9),
)
def test_lists_and_objects_are_counted_and_brackets_in_texts_are_not(value: Any, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "_COUNTED_BYTES", piece)
        body, num = json.dumps(value).encode(), _containers_in(value)
        assert parsing._has_more_containers(body, num - 1)
        assert not parsing._has_more_containers(body, num)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"temperature": 3}, ["temperature", "<= 2", "got 3"]),
        ({"stop": ["a"] * 17}, ["<= 16 items"]),
        ({"top_k": "many"}, ["an integer", 'got "many"']),
        ({"temprature": 1}, ["did you mean temperature?"]),
        ({"max_new_tokens": 1}, ["use max_tokens"]),
        ({"messages": [{"role": "robot", "content": ""}]}, ['"robot"', '"system"', '"environment"']),
        ({"messages": [user([IMAGE])]}, ['"image_url"', '"text"', "text parts only"]),
        ({"model": "x" * 5000}, ["this server serves 'toy'"]),
    ],
)
async def test_messages_say_what_the_limit_is(
    session: aiohttp.ClientSession, url: str, fields: dict[str, Any], parts: list[str]
) -> None:
    _, reply = await post(session, url + CHAT, json.dumps(chat_body() | fields).encode())
    message = reply["error"]["message"]
    assert all(part in message for part in parts), message
    assert len(message) < 500
