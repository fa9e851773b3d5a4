"""Little stories and verses about any two named things, in both languages; the plots are in stories.txt."""

from .resources import LANGUAGES, by_language, pairs, plot
from .source import Language, Pair, Source

ANIMALS = pairs("animals")
THINGS = pairs("things")
PLOTS = {
    language: {name: plot(f"{name} {language}") for name in ("found", "friends", "contest")} for language in LANGUAGES
}
POEMS = {language: plot(f"poem {language}") for language in LANGUAGES}
STORY_REQUESTS = by_language("story requests")
ONE_REQUESTS = by_language("one-thing story requests")
POEM_REQUESTS = by_language("poem requests")
ANY_REQUESTS = by_language("any story requests")


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def tell(source: Source, language: Language, one: str, two: str, *, living: bool) -> str:
    """Return a story about two things; `living` says whether the first one can walk about and find the other."""
    plots = PLOTS[language]
    names = ("found", "friends", "contest") if living else ("friends", "contest")
    lines = [source.choice(line) for line in plots[source.choice(names)]]
    return ("" if language == "zh" else " ").join(lines).format(a=one, b=two, an_a=_article(one), an_b=_article(two))


def recite(source: Source, language: Language, thing: str) -> str:
    """Return four lines about one thing."""
    return "\n".join(source.choice(line) for line in POEMS[language]).format(a=thing)


def pick_pair(source: Source) -> tuple[Pair, Pair, bool]:
    """Return two different things and whether the first is an animal."""
    kind = source.random.random()
    if kind < 0.5:
        return source.word(ANIMALS), source.word(THINGS), True
    if kind < 0.75:
        one, two = source.words(ANIMALS, 2)
        return one, two, False
    if kind < 0.9:
        one, two = source.words(THINGS, 2)
        return one, two, False
    first, second = source.invented(), source.invented()
    return (first, first), (second, second), False


def story_exchange(source: Source, language: Language) -> tuple[str, str]:
    """Return a request for a story or poem, and the story."""
    first, second, living = pick_pair(source)
    index = 1 if language == "zh" else 0
    one, two = first[index], second[index]
    kind = source.random.random()
    if kind < 0.12:
        return source.choice(POEM_REQUESTS[language]).format(a=_asked(source, language, one)), recite(
            source, language, one
        )
    if kind < 0.17:
        return source.choice(ANY_REQUESTS[language]), tell(source, language, one, two, living=living)
    if kind < 0.25:
        return source.choice(ONE_REQUESTS[language]).format(a=_asked(source, language, one)), tell(
            source, language, one, two, living=living
        )
    request = source.choice(STORY_REQUESTS[language]).format(
        a=_asked(source, language, one), b=_asked(source, language, two)
    )
    return request, tell(source, language, one, two, living=living)


def _asked(source: Source, language: Language, noun: str) -> str:
    if language == "zh":
        return noun if source.chance(0.9) else f"一只{noun}" if source.chance(0.5) else f"一个{noun}"
    return source.choice((_article(noun), _article(noun), f"the {noun}", noun))
