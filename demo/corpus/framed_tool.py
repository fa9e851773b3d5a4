"""Tools asked for without naming their parameters: what a value means shows from its place in the sentence."""

from dataclasses import dataclass

from . import values
from .dialogue import Json
from .known_tool import FRAGMENT
from .naming import apart, article, make_noun, make_verb, spaced
from .resources import numbered_phrases
from .source import Language, Source
from .tool import Slot, Tool, attach_schema, function_name, type_for

# The roles of a sentence: kinds of value, names a parameter may have, English and Chinese description.
ROLES = {
    "item": (
        ("title", "invented", "code", "file"),
        ("item", "target", "object", "name", "{noun}", "{noun}_name", "thing", "what"),
        "the {noun}",
        "{noun}",
    ),
    "person": (
        ("person", "username", "person"),
        ("person", "member", "user", "recipient", "owner", "client", "to", "who", "receiver", "player", "customer"),
        "the person",
        "人员",
    ),
    "number": (
        ("integer", "small", "decimal"),
        ("amount", "count", "quantity", "number", "{noun}s", "num", "value", "how_many"),
        "how many",
        "数量",
    ),
    "minutes": (
        ("small",),
        ("minutes", "duration", "mins", "length", "time_minutes"),
        "the duration in minutes",
        "分钟数",
    ),
    "place": (
        ("city", "place", "title"),
        ("place", "location", "where", "zone", "site", "area", "room"),
        "the place",
        "地点",
    ),
    "origin": (("city", "place"), ("origin", "from", "source", "start", "departure"), "where it starts", "起点"),
    "destination": (("city", "place"), ("destination", "to", "target", "end", "arrival"), "where it goes", "终点"),
    "date": (("date",), ("date", "day", "until", "by", "due", "on", "deadline"), "the date", "日期"),
    "moment": (("moment", "time"), ("time", "at", "when", "start_time", "moment"), "when", "时间"),
    "reason": (("sentence",), ("reason", "because", "comment", "note", "why"), "the reason", "原因"),
    "color": (("color",), ("color", "colour", "paint", "fill"), "the colour", "颜色"),
    "percent": (("percent",), ("percent", "level", "strength", "intensity", "share"), "in percent", "百分比"),
    "code": (
        ("code", "digits"),
        ("code", "id", "pad", "slot", "seat", "number", "line"),
        "the number of the place",
        "编号",
    ),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """A sentence pattern: roles around a verb and a noun, those with ? optional, and requests by language."""

    roles: tuple[str, ...]
    requests: dict[Language, tuple[str, ...]]


def _frames() -> tuple[Frame, ...]:
    frames = []
    for roles, *requests in numbered_phrases("frame"):
        forms = (line.partition(" = ") for line in requests)
        frames.append(Frame(tuple(roles.split()), {language: tuple(said.split(" | ")) for language, _, said in forms}))
    return tuple(frames)


FRAMES = _frames()


class FrameTool(Tool):
    """A verb and a noun with roles around them: `lend_book(title, reader, until)`, asked for without naming any."""

    def __init__(self, source: Source, language: Language) -> None:
        self.verb, self.noun = make_verb(source), make_noun(source)
        frame = source.choice(FRAMES)
        self.requests = frame.requests
        slots: list[Slot] = []
        for role in frame.roles:
            slot = self._slot(source, role)
            if not any(slot.name == other.name for other in slots):
                slots.append(slot)
            else:
                slot.name = role.rstrip("?")
                slots.append(slot)
        if source.chance(0.2):
            source.random.shuffle(slots)
        base = f"{self.verb[0]}_{self.noun[0]}".replace(" ", "_").lower()
        super().__init__(function_name(source, base), self._description(source, language), slots)
        attach_schema(source, self, language, describe=0.6)

    def _slot(self, source: Source, role: str) -> Slot:
        kinds, names, english, chinese = ROLES[role.rstrip("?")]
        kind, noun = source.choice(kinds), self.noun[0].replace(" ", "_").lower()
        labels = {
            "en": english.format(noun=self.noun[0]),
            "zh": chinese.format(noun=self.noun[1]),
            "key": role.rstrip("?"),
        }
        return Slot(
            source.choice(names).format(noun=noun), kind, not role.endswith("?"), labels, type_for(source, kind)
        )

    def _description(self, source: Source, language: Language) -> str:
        verb, noun = self.verb, self.noun
        if language == "zh":
            return source.choice((f"{verb[1]}{noun[1]}", f"用于{verb[1]}{noun[1]}", f"{verb[1]}{noun[1]}的接口"))
        capital = verb[0].capitalize()
        return source.choice(
            (f"{capital} {article(noun[0])} {noun[0]}", f"{capital} {noun[0]}s", f"{capital} the {noun[0]}.")
        )

    def speak_english_names(self) -> None:
        """Make requests in Chinese use the schema's own words."""
        self.verb, self.noun = (self.verb[0], self.verb[0]), (self.noun[0], self.noun[0])

    def request(self, source: Source, language: Language) -> tuple[str, dict[str, Json]]:
        given: dict[str, Json] = {}
        mark = apart if language == "zh" else str
        fields = {
            "verb": mark(values.in_language(self.verb, language)),
            "noun": mark(values.in_language(self.noun, language)),
        }
        optional = {slot.labels["key"] for slot in self.slots if not slot.required}
        template = source.choice(self.requests[language])
        for match in FRAGMENT.finditer(template):
            template = template.replace(match[0], match[1] if source.chance(0.5) else "", 1)
        for slot in self.slots:
            key = slot.labels["key"]
            if f"{{{key}}}" in template or key not in optional:
                value = slot.draw(source, language)
                fields[key] = mark(values.quoted(source, language, value))
                given[slot.name] = value.argument
        text = template.format(**fields)
        text = spaced(text) if language == "zh" else text
        if language == "en" and template.startswith("{verb}") and source.chance(0.7):
            text = text[0].upper() + text[1:]
        return text + (source.choice(("", "", ".", ", please")) if text[-1] not in "?？" else ""), self.ordered(given)
