"""Tools composed of a verb, a noun and random parameters, asked for by naming the parameters in many ways."""

from . import values, words
from .dialogue import Json
from .naming import apart, article, made_up, make_noun, make_verb, spaced
from .resources import LANGUAGES, by_language, entries, phrases
from .source import Language, Pair, Source
from .tool import Slot, Tool, attach_schema, camel, function_name, type_for

PARAMETERS = entries("parameters")  # name, Chinese label, kind
MAIN_NAMES = ("id", "name", "target", "number", "{noun}", "{noun}_id", "{noun}_name", "{noun}Id", "which", "ref", "key")
MAIN_KINDS = ("code", "invented", "digits", "title", "file", "code", "code", "invented")
FREE_KINDS = (
    *values.KINDS,
    "enum",
    "enum",
    "enum",
    "boolean",
    "invented",
    "title",
    "small",
    "list:invented",
    "list:integer",
    "list:person",
)


class ComposedTool(Tool):
    """A verb and a noun with any parameters: `archive_invoice(invoice_id, due_date)`."""

    def __init__(self, source: Source, language: Language, verb: Pair | None = None, noun: Pair | None = None) -> None:
        self.verb = verb or make_verb(source)
        self.noun = noun or make_noun(source)
        self.has_main = source.chance(0.6)
        base = f"{self.verb[0]}_{self.noun[0]}".replace(" ", "_").lower()
        if source.chance(0.05):
            base = source.choice((source.invented(), f"fn_{source.integer(1, 999)}", f"f{source.integer(1, 99)}"))
        slots = [self._main_slot(source)] if self.has_main else []
        rename = camel if source.chance(0.2) else str
        wanted = source.random.choices((0, 1, 2, 3, 4, 5), weights=(3, 4, 4, 3, 2, 1))[0] + (0 if self.has_main else 1)
        for _ in range(wanted if not source.chance(0.03) else 0):
            slot = _random_slot(source)
            slot.name = rename(slot.name)
            if not any(slot.name == other.name or slot.labels["zh"] == other.labels["zh"] for other in slots):
                slots.append(slot)
        if source.chance(0.2):
            source.random.shuffle(slots)
        super().__init__(function_name(source, base), self._description(source, language), slots)
        attach_schema(source, self, language, describe=0.7 if language == "en" else 0.85)

    def speak_english_names(self) -> None:
        """Make requests in Chinese use the schema's own words, where a translation would have to be guessed."""
        self.verb, self.noun = (self.verb[0], self.verb[0]), (self.noun[0], self.noun[0])
        for slot in self.slots:
            slot.labels["zh"] = slot.labels["en"]

    def _main_slot(self, source: Source) -> Slot:
        noun = self.noun[0].replace(" ", "_").lower()
        kind = source.choice(MAIN_KINDS)
        labels = {"en": f"the {self.noun[0]}", "zh": self.noun[1]}
        return Slot(source.choice(MAIN_NAMES).format(noun=noun), kind, True, labels, type_for(source, kind))

    def _description(self, source: Source, language: Language) -> str:
        verb, noun = self.verb, self.noun
        if language == "zh":
            forms = (
                f"{verb[1]}{noun[1]}",
                f"{verb[1]}指定的{noun[1]}",
                f"用于{verb[1]}{noun[1]}的工具",
                f"对{noun[1]}进行{verb[1]}",
                f"{verb[1]}一个{noun[1]}。",
            )
            return source.choice(forms)
        capital = verb[0].capitalize()
        forms = (
            f"{capital} {article(noun[0])} {noun[0]}",
            f"{capital} the {noun[0]}.",
            f"{capital} {noun[0]}s",
            f"Use this to {verb[0]} {article(noun[0])} {noun[0]}",
            f"{capital} {article(noun[0])} {noun[0]} in the system",
        )
        return source.choice(forms)

    def request(self, source: Source, language: Language) -> tuple[str, dict[str, Json]]:
        given: dict[str, Json] = {}
        main = (
            next((slot for slot in self.slots if slot.labels["en"] == f"the {self.noun[0]}"), None)
            if self.has_main
            else None
        )
        spoken = self._opening(source, language, main, given)
        others = [slot for slot in self.slots if slot is not main and (slot.required or source.chance(0.5))]
        source.random.shuffle(others)
        drawn = [(slot, slot.draw(source, language)) for slot in others]
        for slot, value in drawn:
            given[slot.name] = value.argument
        if source.chance(0.3):
            implied, drawn = self._implied(source, language, drawn)
            spoken += implied
        by_name = 0.1 if self.described or language == "en" else 1.0
        text = spoken + spoken_arguments(source, language, drawn, by_name=by_name)
        return text, self.ordered(given)

    def _implied(
        self, source: Source, language: Language, drawn: list[tuple[Slot, values.Value]]
    ) -> tuple[str, list[tuple[Slot, values.Value]]]:
        """Say values whose meaning shows without naming the parameter: `in Paris on 2031-04-02`; return the rest."""
        groups = [GROUP_OF_KIND.get(slot.kind) for slot in self.slots]
        said, rest = "", []
        for slot, value in drawn:
            group = GROUP_OF_KIND.get(slot.kind)
            if group and groups.count(group) == 1:
                said += source.choice(IMPLIED[language][group]).format(values.quoted(source, language, value))
            else:
                rest.append((slot, value))
        return said, rest

    def _opening(self, source: Source, language: Language, main: Slot | None, given: dict[str, Json]) -> str:
        mention = ""
        if main:
            value = main.draw(source, language)
            given[main.name] = value.argument
            mention = values.quoted(source, language, value)
        if source.chance(0.06):
            called = {
                "en": f"{source.choice(('Call', 'Use', 'Run'))} {self.name}",
                "zh": f"{source.choice(('调用', '使用', '运行'))}{self.name}",
            }[language]
            link = source.choice((" ", " on ", " for ")) if language == "en" else source.choice(("，", "，对象是", " "))
            return f"{called}{link}{mention}" if main else called
        verb, noun = values.in_language(self.verb, language), values.in_language(self.noun, language)
        if language == "zh":
            name, which = apart(noun), apart(mention)
            tail = (
                source.choice((f"{name}{which}", f"{which}这个{name}", f"编号为{which}的{name}"))
                if main
                else source.choice((noun, f"一个{noun}", f"一下{noun}"))
            )
            return spaced(
                source.choice(OPENINGS["zh"]).format(
                    verb=apart(verb), tail=tail, noun=apart(noun), mention=apart(mention)
                )
            )
        tail = (
            source.choice((f"the {noun} {mention}", f"{noun} {mention}", f"{mention} (the {noun})"))
            if main
            else source.choice((f"the {noun}", f"{article(noun)} {noun}", f"my {noun}"))
        )
        return source.choice(OPENINGS["en"]).format(verb=verb, Verb=verb.capitalize(), tail=tail)


OPENINGS = by_language("openings")
IMPLIED_GROUPS = {
    "person": ("person", "username"),
    "place": ("city", "country", "place", "address"),
    "date": ("date",),
    "time": ("time", "moment"),
    "email": ("email",),
    "url": ("url",),
    "path": ("path", "file"),
    "money": ("money",),
    "language": ("language_name",),
    "currency": ("currency",),
    "text": ("sentence",),
}
GROUP_OF_KIND = {kind: group for group, kinds in IMPLIED_GROUPS.items() for kind in kinds}


def _implied(language: Language) -> dict[str, tuple[str, ...]]:
    """Return how a value of each group is said; an underscore in the file is the space that a phrase begins with."""
    lines = (line.partition(" = ") for line in phrases(f"implied {language}"))
    return {group: tuple(form.replace("_", " ", 1) for form in forms.split(" | ")) for group, _, forms in lines}


IMPLIED = {language: _implied(language) for language in LANGUAGES}


def _random_slot(source: Source) -> Slot:
    if source.chance(0.5):
        return _plain_slot(source)
    first, second = made_up(source), made_up(source)
    kind = source.choice(FREE_KINDS)
    form = source.random.random()
    name, label = first
    if form < 0.35:
        name, label = f"{first[0]}_{second[0]}", first[1] + second[1]
    elif form < 0.5:
        known, known_zh, kind = source.word(PARAMETERS)
        name, label = f"{first[0]}_{known}", first[1] + known_zh
    return _slot(source, name, label, kind)


def _plain_slot(source: Source) -> Slot:
    name, label, kind = source.word(PARAMETERS)
    if source.chance(0.25):
        first = source.word(source.choice((words.NOUNS, words.ADJECTIVES)))
        name, label = f"{first[0]}_{name}", first[1] + label
    return _slot(source, name, label, kind)


def _slot(source: Source, name: str, label: str, kind: str) -> Slot:
    slot = Slot(name, kind, source.chance(0.65), {"en": name.replace("_", " "), "zh": label}, type_for(source, kind))
    if kind == "enum":
        slot.enum = _random_enum(source)
    return slot


def _random_enum(source: Source) -> tuple[Pair, ...]:
    pool = source.choice((words.ADJECTIVES, words.NOUNS, words.COLORS))
    chosen = [pair[0] for pair in source.words(pool, source.integer(2, 5))]
    if source.chance(0.6):
        chosen = list(dict.fromkeys(source.invented() for _ in range(source.integer(2, 5))))
    return tuple((word, word) for word in chosen)


def spoken_arguments(
    source: Source, language: Language, drawn: list[tuple[Slot, values.Value]], *, by_name: float
) -> str:
    """Say the arguments in one of many ways, closing mark included; a share `by_name` is called as in the schema."""
    if not drawn:
        return source.choice(("。", "", "，谢谢")) if language == "zh" else source.choice((".", "", ", please.", "?"))
    pairs = []
    for slot, value in drawn:
        label = slot.name if source.chance(by_name) else slot.labels[language]
        pairs.append((label, values.quoted(source, language, value)))
    return _spoken_zh(source, pairs) if language == "zh" else _spoken_en(source, pairs)


def _spoken_en(source: Source, pairs: list[tuple[str, str]]) -> str:
    style = source.integer(0, 8)
    if style == 0:
        return " with " + values.joined("en", [f"{label} {text}" for label, text in pairs]) + source.choice(("", "."))
    if style == 1:
        return ". " + " ".join(f"The {label} is {text}." for label, text in pairs)
    if style == 2:
        return ", " + ", ".join(f"{label}: {text}" for label, text in pairs)
    if style == 3:
        return " using " + values.joined("en", [f"{text} as the {label}" for label, text in pairs])
    if style == 4:
        return " (" + ", ".join(f"{label}={text}" for label, text in pairs) + ")"
    if style == 5:
        return ":\n" + "\n".join(f"- {label}: {text}" for label, text in pairs)
    if style == 6:
        return "; " + "; ".join(f"set the {label} to {text}" for label, text in pairs) + source.choice(("", "."))
    if style == 7:
        return " where " + values.joined("en", [f"the {label} is {text}" for label, text in pairs])
    return " with " + values.joined(
        "en", [f"{text} as {label}" if source.chance(0.3) else f"the {label} {text}" for label, text in pairs]
    )


def _spoken_zh(source: Source, pairs: list[tuple[str, str]]) -> str:
    style = source.integer(0, 6)
    end = source.choice(("", "。"))
    if style == 0:
        return "，" + "，".join(f"{label}是{text}" for label, text in pairs) + end
    if style == 1:
        return "，" + "，".join(f"{label}为{text}" for label, text in pairs) + end
    if style == 2:
        return "，" + "，".join(f"把{label}设为{text}" for label, text in pairs) + end
    if style == 3:
        return "，" + "，".join(f"{label}：{text}" for label, text in pairs) + end
    if style == 4:
        return "，用" + "，".join(f"{text}作为{label}" for label, text in pairs) + end
    if style == 5:
        return "（" + "，".join(f"{label}={text}" for label, text in pairs) + "）"
    return "：\n" + "\n".join(f"- {label}：{text}" for label, text in pairs)
