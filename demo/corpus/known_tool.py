"""Tools of the catalogue: a concept under one of its names, asked for in one of its ways."""

import re

from . import values
from .catalogue import Concept
from .dialogue import Json
from .source import Language, Source
from .tool import Slot, Tool, attach_schema, camel, function_name, type_for

FRAGMENT = re.compile(r"\[([^\[\]]*)\]")


class KnownTool(Tool):
    """A concept of the catalogue under one of its names."""

    def __init__(self, source: Source, concept: Concept, language: Language) -> None:
        self.concept = concept
        rename = camel if source.chance(0.15) else str
        opaque = source.chance(0.04)
        self.absent: dict[str, Slot] = {}  # parameters that this schema lacks, and people may mention all the same
        slots: list[Slot] = []
        for index, parameter in enumerate(concept.parameters):
            labels = {f"description_{tongue}": source.choice(parameter.descriptions[tongue]) for tongue in ("en", "zh")}
            name = f"arg{index + 1}" if opaque else rename(source.choice(parameter.names))
            while any(slot.name == name for slot in slots):
                name = rename(source.choice(parameter.names)) if source.chance(0.5) else name + "_2"
            slot = Slot(name, parameter.kind, parameter.required, {**labels, "key": parameter.key}, enum=parameter.enum)
            slot.type = type_for(source, parameter.kind)
            slot.enum_index = 1 if language == "zh" and source.chance(0.25) else 0
            if not parameter.required and source.chance(0.25):
                self.absent[parameter.key] = slot
            else:
                slots.append(slot)
        super().__init__(
            function_name(source, source.choice(concept.names)), source.choice(concept.descriptions[language]), slots
        )
        attach_schema(source, self, language, describe=1.0 if opaque else 0.75)

    def request(self, source: Source, language: Language) -> tuple[str, dict[str, Json]]:
        template = source.choice(self.concept.requests[language])
        drawn = {
            slot.labels["key"]: (slot, slot.draw(source, language)) for slot in (*self.slots, *self.absent.values())
        }
        given: dict[str, Json] = {}

        def fill(text: str) -> str:
            def put(match: re.Match[str]) -> str:
                slot, value = drawn[match[1]]
                if match[1] not in self.absent:
                    given[slot.name] = value.argument
                return values.quoted(source, language, value)

            return re.sub(r"\{(\w+)\}", put, text)

        def fragment(match: re.Match[str]) -> str:
            lacking = any(
                key in match[1]
                for key in (*(f"{{{key}}}" for key in self.absent), *(f"?{key} " for key in self.absent))
            )
            if source.chance(0.85 if lacking else 0.5):
                return ""
            if not match[1].startswith("?"):
                return fill(match[1])
            key, _, choices = match[1][1:].partition(" ")
            truth = source.chance(0.5)
            if key not in self.absent:
                given[drawn[key][0].name] = truth
            return choices.split("|")[0 if truth else 1]

        text = fill(FRAGMENT.sub(fragment, template))
        return text, self.ordered(given)

    def single_slot(self) -> Slot | None:
        """Return the slot of a tool that needs exactly one plain value, so that it can be asked for several at once."""
        required = [slot for slot in self.slots if slot.required]
        short = required and required[0].kind in (
            "city",
            "ticker",
            "digits",
            "code",
            "person",
            "invented",
            "country",
            "ip",
        )
        return required[0] if len(required) == 1 and short else None

    def request_many(self, source: Source, language: Language, count: int) -> tuple[str, list[dict[str, Json]]]:
        """Return one sentence that asks for `count` calls of a `single_slot` tool."""
        slot = self.single_slot()
        assert slot is not None
        drawn = [slot.draw(source, language) for _ in range(count)]
        template = FRAGMENT.sub("", source.choice(self.concept.requests[language]))
        text = re.sub(r"\{\w+\}", lambda _: values.joined(language, [value.text for value in drawn]), template)
        return text, [{slot.name: value.argument} for value in drawn]
