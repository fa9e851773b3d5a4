"""What little the model knows by heart: simple facts, suggestions by topic, and plain sentences to continue."""

from .resources import by_language, entries
from .source import Language, Source

CAPITALS = entries("capitals")  # country and capital, in English and Chinese
GENERAL_SUGGESTIONS = by_language("general suggestions")
ADVICE_REQUESTS = by_language("advice requests")
INTROS = by_language("advice intros")
ABOUT_A_CITY = by_language("about a city")


def _split(section: str) -> dict[Language, tuple[tuple[str, str], ...]]:
    """Return what stands left and right of = in each phrase of a section."""
    found = {}
    for language, lines in by_language(section).items():
        parts = (line.partition(" = ") for line in lines)
        found[language] = tuple((left, right) for left, _, right in parts)
    return found


FACTS = _split("facts")  # questions, separated by |, and the answer
CITIES_KNOWN = {language: dict(known) for language, known in _split("cities known").items()}
TOPICS = {  # names of a topic, and what can be suggested
    language: tuple((tuple(names.split("|")), tuple(known.split(" | "))) for names, known in topics)
    for language, topics in _split("topics").items()
}


def suggestions(source: Source, language: Language, topic: str, known: tuple[str, ...]) -> str:
    """Return three numbered suggestions, out of `known` ones when there are any."""
    pool = known or tuple(text.format(topic=topic) for text in GENERAL_SUGGESTIONS[language])
    chosen = source.random.sample(pool, 3)
    lines = [f"{number}. {text}" for number, text in enumerate(chosen, 1)]
    return "\n".join([source.choice(INTROS[language]).format(topic=topic), *lines])
