"""Sets of tools to offer in one dialogue, none of which could be meant by a request for another."""

from .catalogue import concepts
from .composed_tool import ComposedTool
from .framed_tool import FrameTool
from .known_tool import KnownTool
from .source import Language, Source, Split
from .tool import Tool

# Concepts whose requests could be meant for one another are never offered together.
CONFLICTS = (
    {"web_search", "search_products", "get_movie", "find_restaurants", "get_news", "get_definition"},
    {"run_sql", "run_code"},
    {"place_order", "add_to_list"},
    {"create_task", "set_reminder", "create_note"},
    {"send_message", "set_reminder"},
)


def offer(source: Source, language: Language) -> list[Tool]:
    """Return one to a dozen distinct tools in random order, for a user who speaks `language`.

    Four in ten Chinese users have tools that are described in English.
    """
    count = source.random.choices((1, 2, 3, 4, 5, 6, 12), weights=(22, 24, 20, 14, 10, 8, 2))[0]
    known_share = source.choice((0.0, 0.5, 0.5, 1.0))
    schema_language = "en" if language == "zh" and source.chance(0.4) else language
    pool = (
        concepts(Split.TRAIN) + concepts(Split.HELD_OUT) * 4
        if source.split is Split.HELD_OUT
        else concepts(Split.TRAIN)
    )
    tools: list[Tool] = []
    while len(tools) < count:
        if source.chance(known_share):
            tool: Tool = KnownTool(source, source.choice(pool), schema_language)
        elif source.chance(0.42):
            tool = FrameTool(source, schema_language)
        else:
            tool = _composed(source, schema_language, tools)
        if not any(_confusable(tool, other) for other in tools):
            tools.append(tool)
    if schema_language != language:
        for tool in tools:
            if isinstance(tool, ComposedTool | FrameTool):
                tool.speak_english_names()
    return tools


def _composed(source: Source, language: Language, others: list[Tool]) -> Tool:
    """Compose a tool, often with the verb or the noun of one that is already there."""
    relatives = [tool for tool in others if isinstance(tool, ComposedTool)]
    if relatives and source.chance(0.4):
        relative = source.choice(relatives)
        return (
            ComposedTool(source, language, verb=relative.verb)
            if source.chance(0.5)
            else ComposedTool(source, language, noun=relative.noun)
        )
    return ComposedTool(source, language)


def _confusable(one: Tool, two: Tool) -> bool:
    if one.name == two.name or one.description == two.description:
        return True
    if isinstance(one, FrameTool) or isinstance(two, FrameTool):
        return bool(_words_of(one) & _words_of(two))
    if isinstance(one, ComposedTool) and isinstance(two, ComposedTool):
        return (one.verb, one.noun) == (two.verb, two.noun)
    if isinstance(one, KnownTool) and isinstance(two, KnownTool):
        names = {*one.concept.names, *two.concept.names}
        return one.concept is two.concept or any(len(group & names) > 1 for group in CONFLICTS)
    composed, known = (one, two) if isinstance(one, ComposedTool) else (two, one)
    return isinstance(composed, ComposedTool) and f"{composed.verb[0]}_{composed.noun[0]}" in known.concept.names  # type: ignore[attr-defined]


def _words_of(tool: Tool) -> set[str]:
    """Return the English words that say what a tool is about."""
    if isinstance(tool, ComposedTool | FrameTool):
        return {*tool.verb[0].split(), *tool.noun[0].split()}
    return {word for name in tool.concept.names for word in name.split("_")} if isinstance(tool, KnownTool) else set()
