"""What a tool of the corpus is: its name, parameters and schema, written as many people write them.

A `Tool` can ask for itself: `request` returns what a user says and the arguments the call must have. The kinds of tools
are in known_tool.py, composed_tool.py and framed_tool.py; `toolbox.py` puts sets of them together.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from . import values
from .dialogue import Json
from .resources import phrases
from .source import Language, Pair, Source


@dataclass(slots=True)
class Slot:
    """One parameter of an offered tool: its name in the schema, and how people call it."""

    name: str
    kind: str
    required: bool
    labels: dict[Language, str]
    type: str = "string"
    enum: tuple[Pair, ...] = ()
    enum_index: int = 0  # which half of the pair the schema holds

    def draw(self, source: Source, language: Language) -> values.Value:
        """Return a fresh value for this parameter."""
        if self.enum:
            pair = source.choice(self.enum)
            return values.Value(values.in_language(pair, language), pair[self.enum_index])
        if self.kind.startswith("list:"):
            items = [values.KINDS[self.kind[5:]](source, language) for _ in range(source.choice((1, 2, 2, 3, 3, 4)))]
            return values.Value(
                values.joined(language, [item.text for item in items]), [item.argument for item in items]
            )
        kind = "symbol" if self.kind in ("title", "sentence", "invented") and source.chance(0.03) else self.kind
        value = values.KINDS[kind](source, language)
        return (
            value._replace(argument=int(value.argument))
            if self.type == "integer" and isinstance(value.argument, str)
            else value
        )


class Tool(ABC):
    """A tool as offered in one dialogue."""

    def __init__(self, name: str, description: str, slots: list[Slot]) -> None:
        self.name = name
        self.description = description
        self.slots = slots
        self.schema: Json = {}
        self.described = True  # whether the schema says what each parameter is

    @abstractmethod
    def request(self, source: Source, language: Language) -> tuple[str, dict[str, Json]]:
        """Return a user's sentence and the arguments it asks for."""

    def ordered(self, given: dict[str, Json]) -> dict[str, Json]:
        """Return arguments in the order of the schema."""
        return {slot.name: given[slot.name] for slot in self.slots if slot.name in given}


def camel(name: str) -> str:
    """Return a snake_case name in camelCase."""
    head, *tail = name.split("_")
    return head + "".join(part.capitalize() for part in tail)


def function_name(source: Source, base: str) -> str:
    """Return a function name made of `base` that belongs to the source's split: half of them plain, half dressed up."""
    dressed = source.chance(0.5)
    while True:
        name = (
            _dressed(source, base)
            if dressed
            else source.choice((base, base, base, camel(base), camel(base), _pascal(base)))
        )
        if source.owns(name):
            return name
        dressed = True


def _pascal(base: str) -> str:
    return camel(base)[:1].upper() + camel(base)[1:]


def _dressed(source: Source, base: str) -> str:
    word = source.invented()
    return source.choice(DRESSED).format(
        base=base,
        camel=camel(base),
        pascal=_pascal(base),
        word=word,
        Word=word.capitalize(),
        word2=source.invented(),
        number=source.integer(1, 99),
        digit=source.integer(1, 9),
        prefix=source.choice(PREFIXES),
        suffix=source.choice(SUFFIXES),
    )


DRESSED = phrases("function names")
PREFIXES = phrases("function name prefixes")
SUFFIXES = phrases("function name suffixes")


def attach_schema(source: Source, tool: Tool, language: Language, *, describe: float = 0.75) -> None:
    """Give the tool a schema written the way one of many people writes them."""
    tool.described = source.chance(describe)
    parameters = _parameters_schema(source, tool.slots, language, tool.described)
    tool.schema = {"name": tool.name, "description": tool.description, "parameters": parameters}
    if source.chance(0.03):
        del tool.schema["description"]


def _parameters_schema(source: Source, slots: list[Slot], language: Language, described: bool) -> Json:
    properties = {slot.name: _property(source, slot, language, described) for slot in slots}
    required = [slot.name for slot in slots if slot.required]
    schema: Json = {"type": "object", "properties": properties}
    if source.chance(0.85) or len(required) < len(slots):
        schema["required"] = required
    if source.chance(0.06):
        schema = {"type": "object", "required": required, "properties": properties}
    if source.chance(0.05):
        schema["additionalProperties"] = False
    return schema


def _property(source: Source, slot: Slot, language: Language, described: bool) -> Json:
    entry: Json = {"type": slot.type}
    if slot.kind.startswith("list:"):
        kind = values.json_type(slot.kind[5:])
        entry = {"type": "array", "items": {"type": kind}}
    if slot.enum and source.chance(0.85):
        entry["enum"] = [pair[slot.enum_index] for pair in slot.enum]
    if described and (label := slot.labels.get(f"description_{language}") or slot.labels.get(language)):
        entry = {**entry, "description": label} if source.chance(0.8) else {"description": label, **entry}
    if not slot.required and source.chance(0.06) and slot.type == "integer":
        entry["default"] = source.integer(0, 10)
    return entry


def type_for(source: Source, kind: str) -> str:
    """Return the schema type of a value kind; a number used as a name may be a string or an integer."""
    if kind == "digits":
        return source.choice(("string", "integer"))
    if kind in values.INTEGERS and source.chance(0.15):
        return "number"
    return values.json_type(kind)
