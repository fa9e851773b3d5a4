"""Dialogues with tools offered: calls, several at once, chains, results, failures, questions that need none."""

import json
from collections.abc import Callable

from . import values
from .chat import tool_free_exchange
from .composed_tool import ComposedTool
from .dialogue import Call, Dialogue, Json
from .known_tool import KnownTool
from .naming import make_noun
from .resources import by_language, entries, phrases
from .source import Language, Source
from .tool import Slot, Tool, attach_schema, function_name
from .toolbox import offer

RESULT_FIELDS = entries("result fields")  # name, Chinese label, kind
BEFORE_CALL = by_language("before call")
DONE = by_language("done")
NO_TOOL = by_language("no tool")
ERRORS = phrases("errors")
OK_RESULTS = phrases("results that say nothing")


def _result_and_answer(source: Source, language: Language, lead: str = "") -> tuple[str, str]:
    """Return what a tool gave back and what the assistant says about it."""
    style = source.random.random()
    if style < 0.2:
        return source.choice(OK_RESULTS), source.choice(DONE[language])
    if style < 0.3:
        return _failure(source, language)
    if style < 0.5:
        kind = source.choice(("integer", "decimal", "title", "sentence", "code", "money", "invented", "url"))
        value = values.KINDS[kind](source, language)
        content = value.text if isinstance(value.argument, str) else str(value.argument)
        if source.chance(0.2):
            content, plain = json.dumps({"result": value.argument}, ensure_ascii=False), content
            return content, _single(source, language, plain)
        return content, _single(source, language, content)
    if style < 0.6:
        items = [values.KINDS["title"](source, language).text for _ in range(source.integer(2, 4))]
        return json.dumps(items, ensure_ascii=False), _listed(language, items)
    fields = source.words(RESULT_FIELDS, source.choice((1, 1, 2, 2, 3, 4)))
    return _record(source, language, fields)


def _failure(source: Source, language: Language) -> tuple[str, str]:
    error = source.choice(ERRORS) if source.chance(0.5) else values.KINDS["sentence"](source, language).text
    contents = (
        json.dumps({"error": error}, ensure_ascii=False),
        f"Error: {error}",
        f"error: {error}",
        json.dumps({"status": "error", "message": error}, ensure_ascii=False),
        json.dumps({"success": False, "error": error}, ensure_ascii=False),
    )
    if language == "zh":
        return source.choice(contents), f"抱歉，调用失败了：{error}"
    return source.choice(contents), f"Sorry, the call failed: {error}"


def _single(source: Source, language: Language, content: str) -> str:
    return f"结果是：{content}" if language == "zh" else f"The result: {content}"


def _listed(language: Language, items: list[str]) -> str:
    return ("结果有：" if language == "zh" else "Here is what I found: ") + values.joined(language, items)


def _record(source: Source, language: Language, fields: list[tuple[str, ...]]) -> tuple[str, str]:
    record: dict[str, Json] = {}
    said: list[str] = []
    for name, label, kind in fields:
        key, spoken = (name, label if language == "zh" else name.replace("_", " "))
        if source.chance(0.15):
            key = source.invented()
            spoken = key
        value = values.KINDS[kind](source, language)
        record[key] = value.argument
        text = value.argument if isinstance(value.argument, str) else json.dumps(value.argument)
        said.append(f"{spoken}是{text}" if language == "zh" else f"the {spoken} is {text}")
    content = json.dumps(record, ensure_ascii=False)
    if language == "zh":
        return content, "查到了：" + "，".join(said) + "。"
    sentence = values.joined("en", said)
    return content, sentence[0].upper() + sentence[1:] + "."


def _opening(source: Source, language: Language) -> str:
    return source.choice(BEFORE_CALL[language]) if source.chance(0.1) else ""


def _polite(source: Source, language: Language, text: str) -> str:
    """Say it as people do: sometimes with a greeting before or thanks after."""
    if source.chance(0.85):
        return text
    if language == "zh":
        return source.choice(("你好，{}", "麻烦你，{}", "{}，谢谢", "嗨，{}", "请问，{}", "小助手，{}")).format(text)
    return source.choice(
        ("Hi, {}", "Hello! {}", "{} Thanks!", "Hey, {}", "Could you help me? {}", "OK, now: {}", "{} Thank you.")
    ).format(text)


def single_call(source: Source, dialogue: Dialogue, tools: list[Tool]) -> None:
    """One request, one call, its result, the answer."""
    language = dialogue.language
    tool = source.choice(tools)
    text, arguments = tool.request(source, language)
    dialogue.say(_polite(source, language, text), _opening(source, language), Call(tool.name, arguments))
    result, answer = _result_and_answer(source, language)
    dialogue.result(result)
    dialogue.answer(answer)


def many_calls(source: Source, dialogue: Dialogue, tools: list[Tool]) -> None:
    """One request that needs two or three independent calls in one turn."""
    language = dialogue.language
    single = [tool for tool in tools if isinstance(tool, KnownTool) and tool.single_slot()]
    if single and source.chance(0.7):
        tool = source.choice(single)
        text, all_arguments = tool.request_many(source, language, source.choice((2, 2, 3)))
        calls = [Call(tool.name, arguments) for arguments in all_arguments]
    elif len(tools) > 1:
        chosen = source.random.sample(tools, 2)
        requests = [tool.request(source, language) for tool in chosen]
        link = (
            source.choice(("；另外，", "。还有，", "，同时", "\n"))
            if language == "zh"
            else source.choice((" Also, ", " And also: ", "\n", " Then, ", " Besides, "))
        )
        text = link.join(request for request, _ in requests)
        calls = [Call(tool.name, arguments) for tool, (_, arguments) in zip(chosen, requests, strict=True)]
    else:
        single_call(source, dialogue, tools)
        return
    dialogue.say(text, _opening(source, language), *calls)
    pairs = [_result_and_answer(source, language) for _ in calls]
    dialogue.result(*(result for result, _ in pairs))
    dialogue.answer("\n".join(answer for _, answer in pairs))


def no_fit(source: Source, dialogue: Dialogue, tools: list[Tool]) -> None:
    """A request for a tool that is not offered."""
    language = dialogue.language
    missing = [tool for tool in offer(source, language) if not any(_alike(tool, other) for other in tools)]
    if not missing:
        plain_chat(source, dialogue, tools)
        return
    text, _ = missing[0].request(source, language)
    dialogue.say(_polite(source, language, text), source.choice(NO_TOOL[language]))


def _alike(one: Tool, two: Tool) -> bool:
    if isinstance(one, KnownTool) and isinstance(two, KnownTool):
        return one.concept is two.concept or bool(
            {name.split("_")[-1] for name in one.concept.names} & {name.split("_")[-1] for name in two.concept.names}
        )
    if isinstance(one, ComposedTool) and isinstance(two, ComposedTool):
        return one.verb == two.verb or one.noun == two.noun
    return one.name == two.name


def plain_chat(source: Source, dialogue: Dialogue, tools: list[Tool]) -> None:
    """Chat that needs no tool although some are offered."""
    tool_free_exchange(source, dialogue)


def ask_back(source: Source, dialogue: Dialogue, tools: list[Tool]) -> None:
    """A request without the value it needs, asked for, given, and then called."""
    language = dialogue.language
    known = [
        tool
        for tool in tools
        if isinstance(tool, ComposedTool) and tool.has_main and sum(slot.required for slot in tool.slots) == 1
    ]
    if not known:
        single_call(source, dialogue, tools)
        return
    tool = source.choice(known)
    slot = next(slot for slot in tool.slots if slot.required)
    verb, noun = values.in_language(tool.verb, language), values.in_language(tool.noun, language)
    if slot.labels["en"] != f"the {tool.noun[0]}":
        single_call(source, dialogue, tools)
        return
    text = (
        source.choice((f"请帮我{verb}一个{noun}", f"我要{verb}{noun}"))
        if language == "zh"
        else source.choice((f"Please {verb} a {noun} for me", f"I want to {verb} one {noun}"))
    )
    dialogue.say(text, f"请问是哪个{noun}？" if language == "zh" else f"Which {noun} do you mean?")
    value = slot.draw(source, language)
    dialogue.say(values.quoted(source, language, value), "", Call(tool.name, {slot.name: value.argument}))
    result, answer = _result_and_answer(source, language)
    dialogue.result(result)
    dialogue.answer(answer)


ROUNDS: tuple[tuple[Callable[[Source, Dialogue, list[Tool]], None], float], ...] = (
    (single_call, 70),
    (many_calls, 11),
    (no_fit, 1.5),
    (plain_chat, 12),
    (ask_back, 1),
)


def tool_dialogue(source: Source, language: Language) -> Dialogue:
    """Return a dialogue of one to five rounds with tools offered."""
    dialogue = Dialogue("tools", language)
    tools = offer(source, language)
    for tool in tools:
        if isinstance(tool, ComposedTool) and source.chance(0.04):
            _nest(source, tool)
    dialogue.tools = [tool.schema for tool in tools]
    rounds, weights = zip(*ROUNDS, strict=True)
    for _ in range(source.choice((1, 1, 2, 3, 4))):
        source.random.choices(rounds, weights)[0](source, dialogue, tools)
    return dialogue


def _nest(source: Source, tool: ComposedTool) -> None:
    """Make one list parameter an array of another kind, so that arrays of numbers are met too."""
    slot = next((slot for slot in tool.slots if slot.kind.startswith("list:")), None)
    if slot:
        slot.kind = source.choice(("list:integer", "list:decimal", "list:code"))
        attach_schema(source, tool, "en")


CHAIN_FIELDS = entries("chain fields")
CHAIN_REQUESTS = by_language("chain requests")


def chain_dialogue(source: Source, language: Language) -> Dialogue:
    """Look something up, then use what was found in a second call."""
    dialogue = Dialogue("chain", language)
    field, label, kind = source.choice(CHAIN_FIELDS)
    noun = make_noun(source)
    finder = _finder(source, language, field, label, noun)
    user = ComposedTool(source, language)
    shown = field if source.chance(0.7) else source.choice(("target", "value", "ref", "input"))
    linked = Slot(shown, kind, True, {"en": f"the {field.replace('_', ' ')}", "zh": label}, values.json_type(kind))
    user.has_main = False
    extra = [slot for slot in user.slots if slot.name != shown and slot.labels["zh"] not in (label, user.noun[1])][:1]
    user.slots = [linked, *extra] if source.chance(0.6) else [linked]
    attach_schema(source, user, language, describe=0.8)
    others = [tool for tool in offer(source, language) if not isinstance(tool, ComposedTool) or tool.verb != user.verb]
    tools: list[Tool] = [finder, user, *others[: source.choice((0, 0, 1, 2))]]
    source.random.shuffle(tools)
    dialogue.tools = [tool.schema for tool in tools]
    for _ in range(source.choice((1, 1, 2))):
        _chain_round(source, dialogue, finder, user, linked, (noun, field, label))
    return dialogue


class _Finder(Tool):
    """A look-up of one field by one key; the chain writes its own requests."""

    def request(self, source: Source, language: Language) -> tuple[str, dict[str, Json]]:
        raise NotImplementedError


def _finder(source: Source, language: Language, field: str, label: str, noun: tuple[str, ...]) -> Tool:
    verb = source.choice(("get", "find", "lookup", "fetch", "query", "retrieve"))
    word = noun[0].replace(" ", "_")
    key = source.choice(("name", word, f"{word}_name", "query", "key"))
    kind = source.choice(("invented", "person", "title", "code"))
    slot = Slot(key, kind, True, {"en": f"the {noun[0]}", "zh": noun[1]}, "string")
    name = function_name(
        source, source.choice((f"{verb}_{field}", f"{verb}_{word}_{field}", f"{verb}_{field}_of_{word}"))
    )
    english = source.choice(
        (f"Get the {field.replace('_', ' ')} of a {noun[0]}", f"Find a {noun[0]}'s {field.replace('_', ' ')}")
    )
    tool = _Finder(name, f"查询{noun[1]}的{label}" if language == "zh" else english, [slot])
    attach_schema(source, tool, language)
    return tool


def _chain_round(
    source: Source,
    dialogue: Dialogue,
    finder: Tool,
    user: ComposedTool,
    linked: Slot,
    topic: tuple[tuple[str, ...], str, str],
) -> None:
    language = dialogue.language
    noun, field, _ = topic
    entity, found = finder.slots[0].draw(source, language), linked.draw(source, language)
    extra = [(slot, slot.draw(source, language)) for slot in user.slots if slot is not linked]
    dialogue.say(
        _chain_request(source, language, topic, values.quoted(source, language, entity), user, extra),
        _opening(source, language),
        Call(finder.name, {finder.slots[0].name: entity.argument}),
    )
    plain = found.argument if isinstance(found.argument, str) else json.dumps(found.argument)
    key = field if source.chance(0.8) else "result"
    record: dict[str, Json] = {key: found.argument}
    if source.chance(0.3):
        record = {**record, "status": "ok"} if source.chance(0.5) else {noun[0]: entity.argument, **record}
    dialogue.result(plain if source.chance(0.4) else json.dumps(record, ensure_ascii=False))
    arguments = user.ordered({linked.name: found.argument, **{slot.name: value.argument for slot, value in extra}})
    dialogue.answer("", Call(user.name, arguments))
    result, answer = _result_and_answer(source, language)
    dialogue.result(result)
    dialogue.answer(answer)


def _chain_request(
    source: Source,
    language: Language,
    topic: tuple[tuple[str, ...], str, str],
    entity: str,
    user: ComposedTool,
    extra: list[tuple[Slot, values.Value]],
) -> str:
    noun, field, label = topic
    verb, thing = values.in_language(user.verb, language), values.in_language(user.noun, language)
    shown = label if language == "zh" else field.replace("_", " ")
    request = source.choice(CHAIN_REQUESTS[language]).format(
        noun=values.in_language(noun, language), field=shown, entity=entity, verb=verb, thing=thing
    )
    form = "，{}是{}" if language == "zh" else ", {} {}"
    said = (form.format(slot.labels[language], values.quoted(source, language, value)) for slot, value in extra)
    return request + "".join(said)
