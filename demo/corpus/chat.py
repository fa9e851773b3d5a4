"""Chat without tools: small talk, who the model is, facts, sums, suggestions, stories, memory, and plain text."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from . import facts, values, words
from .dialogue import Dialogue, Turn
from .resources import by_language
from .source import Language, Source
from .stories import story_exchange

Exchange = tuple[str, str]  # what the user says, what the assistant answers
Kind = Callable[[Source, Dialogue, Language], None]

SYSTEM_PROMPTS = by_language("system prompts")
NAMED_SYSTEM = by_language("named system")
WHO = by_language("who")
I_AM = by_language("i am")
I_AM_NAMED = by_language("i am named")

Block = tuple[tuple[str, ...], tuple[str, ...]]  # questions, answers


@cache
def smalltalk(mark: str) -> dict[Language, tuple[Block, ...]]:
    """Return the blocks of smalltalk.txt whose questions carry `mark`, by language."""
    blocks: dict[Language, list[Block]] = {"en": [], "zh": []}
    questions: tuple[str, ...] = ()
    for line in (Path(__file__).parent / "smalltalk.txt").read_text(encoding="utf-8").splitlines():
        tag, _, rest = line.partition(" ")
        parts = tuple(part.strip() for part in rest.split(" | "))
        if tag[2:] in (">", "?"):
            questions = parts if tag[2:] == mark else ()
        elif tag[2:] == "<" and questions:
            blocks[tag[:2]].append((questions, parts))
    return {language: tuple(pairs) for language, pairs in blocks.items()}


def chat_dialogue(source: Source, language: Language) -> Dialogue:
    """Return a conversation of one to six exchanges, mostly in one language."""
    dialogue = Dialogue("chat", language)
    add_system(source, dialogue, share=0.4)
    for _ in range(source.choice((1, 1, 2, 3, 4, 6))):
        chat_exchange(source, dialogue)
    return dialogue


def add_system(source: Source, dialogue: Dialogue, share: float) -> None:
    """Put a system prompt in front of some dialogues; now and then one that gives the assistant a name."""
    if not source.chance(share):
        return
    dialogue.turns.insert(
        0, Turn("system", source.choice(SYSTEM_PROMPTS[dialogue.language if source.chance(0.85) else "en"]))
    )


def chat_exchange(source: Source, dialogue: Dialogue) -> None:
    """Add one question and its answer, of any kind."""
    _exchange(source, dialogue, (*TOOL_FREE, *TOOL_WISHING))


def tool_free_exchange(source: Source, dialogue: Dialogue) -> None:
    """Add one question that no tool could be meant for."""
    _exchange(source, dialogue, TOOL_FREE)


def _exchange(source: Source, dialogue: Dialogue, kinds: tuple[tuple[Kind, float], ...]) -> None:
    language = dialogue.language if source.chance(0.95) else ("zh" if dialogue.language == "en" else "en")
    makers, weights = zip(*kinds, strict=True)
    source.random.choices(makers, weights)[0](source, dialogue, language)


def named_dialogue(source: Source, language: Language) -> Dialogue:
    """A system prompt gives the assistant a name, and the user asks for it."""
    dialogue = Dialogue("chat", language)
    name = values.KINDS["invented"](source, language).text
    dialogue.turns.append(Turn("system", source.choice(NAMED_SYSTEM[language]).format(name=name)))
    if source.chance(0.3):
        chat_exchange(source, dialogue)
    dialogue.say(source.choice(WHO[language]), source.choice(I_AM_NAMED[language]).format(name=name))
    return dialogue


def _small_talk(source: Source, language: Language) -> Exchange:
    questions, answers = source.choice(smalltalk(">")[language])
    return _varied(source, language, source.choice(questions)), source.choice(answers)


def _look_up(source: Source, language: Language) -> Exchange:
    """A question that would need a tool, where none is offered."""
    questions, answers = source.choice(smalltalk("?")[language])
    return _varied(source, language, source.choice(questions)), source.choice(answers)


def _who(source: Source, language: Language) -> Exchange:
    return source.choice(WHO[language]), source.choice(I_AM[language])


def _varied(source: Source, language: Language, text: str) -> str:
    """Change the writing a little: case, the closing mark, a polite word."""
    if source.chance(0.6):
        return text
    if language == "zh":
        bare = text.rstrip("？！。")
        return source.choice((bare, f"{bare}？", f"请问{bare}", f"{bare}。", f"{bare}呢", f"{bare}！"))
    bare = text.rstrip("?!.")
    return source.choice(
        (bare, bare.lower(), f"{bare}.", f"{bare}!", f"Please, {bare[0].lower()}{bare[1:]}", f"{bare}?")
    )


def _fact(source: Source, language: Language) -> Exchange:
    if source.chance(0.3):
        country, country_zh, capital, capital_zh = source.choice(facts.CAPITALS)
        if language == "zh":
            return source.choice(
                (f"{country_zh}的首都是哪里？", f"{country_zh}的首都是什么", f"{country_zh}首都在哪？")
            ), f"{country_zh}的首都是{capital_zh}。"
        return source.choice(
            (f"What is the capital of {country}?", f"capital of {country}", f"What's the capital city of {country}?")
        ), f"The capital of {country} is {capital}."
    questions, answer = source.choice(facts.FACTS[language])
    return _varied(source, language, source.choice(questions.split("|"))), answer


def _sum(source: Source, language: Language) -> Exchange:
    """Arithmetic small enough to know by heart."""
    operator = source.choice("+-*")
    one, two = (
        (source.integer(0, 12), source.integer(0, 12))
        if operator == "*"
        else (source.integer(0, 20), source.integer(0, 20))
    )
    if operator == "-" and two > one:
        one, two = two, one
    value = {"+": one + two, "-": one - two, "*": one * two}[operator]
    word = {"en": {"+": "plus", "-": "minus", "*": "times"}, "zh": {"+": "加", "-": "减", "*": "乘"}}[language][
        operator
    ]
    gap = " " if source.chance(0.5) else ""
    text = (
        f"{one}{gap}{operator}{gap}{two}"
        if source.chance(0.6)
        else f"{one} {word} {two}"
        if language == "en"
        else f"{one}{word}{two}"
    )
    if language == "zh":
        return source.choice(("{}等于几？", "{}等于多少", "计算{}", "{}=?")).format(
            text
        ), f"{one}{operator}{two}={value}。"
    return source.choice(("What is {}?", "How much is {}?", "{} = ?", "Compute {}", "What's {}?", "{}")).format(
        text
    ), f"{one} {operator} {two} = {value}."


def _advice(source: Source, language: Language) -> Exchange:
    if source.chance(0.25):
        topic = (
            source.word(words.NOUNS)[1 if language == "zh" else 0]
            if source.chance(0.5)
            else values.KINDS["invented"](source, language).text
        )
        known: tuple[str, ...] = ()
    else:
        aliases, known = source.choice(facts.TOPICS[language])
        topic = source.choice(aliases)
    return source.choice(facts.ADVICE_REQUESTS[language]).format(topic=topic), facts.suggestions(
        source, language, topic, known
    )


def _repeat(source: Source, language: Language) -> Exchange:
    text = values.KINDS[source.choice(("sentence", "title", "code", "invented", "symbol", "snippet"))](
        source, language
    ).text
    if language == "zh":
        return source.choice(("重复我说的话：{}", "请说：{}", "跟我念：{}", "复述一遍：{}", "请输出“{}”")).format(
            text
        ), text
    return source.choice(("Repeat after me: {}", "Say: {}", "Please repeat: {}", 'Say "{}"', "Echo this: {}")).format(
        text
    ), text


def _remember(source: Source, dialogue: Dialogue, language: Language) -> None:
    """The user tells a name, and asks for it later."""
    name = values.KINDS["person"](source, language).text
    if language == "zh":
        dialogue.say(
            source.choice((f"我叫{name}", f"我的名字是{name}。", f"你好，我是{name}")),
            source.choice((f"你好，{name}！很高兴认识你。", f"{name}，你好！")),
        )
    else:
        dialogue.say(
            source.choice((f"My name is {name}", f"I am {name}.", f"Hi, I'm {name}", f"Call me {name}.")),
            source.choice((f"Nice to meet you, {name}!", f"Hello, {name}! How can I help you?")),
        )
    if source.chance(0.4):
        questions, answers = source.choice(smalltalk(">")[language])
        dialogue.say(source.choice(questions), source.choice(answers))
    if source.chance(0.7):
        if language == "zh":
            dialogue.say(source.choice(("我叫什么名字？", "你还记得我的名字吗？", "我是谁？")), f"你叫{name}。")
        else:
            dialogue.say(
                source.choice(("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?")),
                f"Your name is {name}.",
            )


def _unknown(source: Source, language: Language) -> Exchange:
    """Questions about things nobody can know."""
    thing = values.KINDS[source.choice(("invented", "title", "person", "place"))](source, language).text
    if language == "zh":
        question = source.choice(
            ("{}是什么？", "你知道{}吗？", "介绍一下{}", "{}是谁？", "{}在哪里？", "{}有什么用？", "告诉我{}的历史")
        ).format(thing)
        return question, source.choice((f"抱歉，我不了解{thing}。", f"对不起，我不知道{thing}，我只是一个很小的模型。"))
    question = source.choice(
        (
            "What is {}?",
            "Do you know {}?",
            "Tell me about {}",
            "Who is {}?",
            "Where is {}?",
            "What is {} good for?",
            "Explain {}",
        )
    ).format(thing)
    return question, source.choice(
        (f"Sorry, I don't know anything about {thing}.", f"I'm afraid I don't know {thing}: I am a very small model.")
    )


def _city(source: Source, language: Language) -> Exchange:
    city = source.word(words.CITIES)[1 if language == "zh" else 0]
    answer = facts.CITIES_KNOWN[language].get(city) or source.choice(facts.ABOUT_A_CITY[language]).format(city=city)
    if language == "zh":
        return source.choice(("介绍一下{}", "说说{}", "{}怎么样？", "跟我讲讲{}这座城市")).format(city), answer
    return source.choice(("Tell me about {}", "What is {} like?", "Describe {}", "What do you know about {}?")).format(
        city
    ), answer


def plain_dialogue(source: Source, language: Language) -> Dialogue:
    """Plain text for completions: a sentence about a city, a story, a fact, a greeting."""
    kind = source.random.random()
    if kind < 0.45:
        _, text = _city(source, language)
    elif kind < 0.7:
        _, text = story_exchange(source, language)
    elif kind < 0.8:
        _, text = _fact(source, language)
    elif kind < 0.9:
        question, answer = _advice(source, language)
        text = f"{question}\n{answer}"
    else:
        questions, answers = source.choice(smalltalk(">")[language][:5])
        mark = source.choice(("! ", ", ", ". ")) if language == "en" else "！"
        text = source.choice(questions).rstrip("!.！。") + mark + source.choice(answers)
    return Dialogue("plain", language, text=text)


def _said(make: Callable[[Source, Language], Exchange]) -> Kind:
    """Turn a maker of one exchange into one that adds it to a dialogue."""
    return lambda source, dialogue, language: dialogue.say(*make(source, language))


TOOL_FREE: tuple[tuple[Kind, float], ...] = (
    (_said(_small_talk), 0.30),
    (_said(_who), 0.07),
    (_said(_fact), 0.08),
    (_said(_advice), 0.15),
    (_said(story_exchange), 0.20),
    (_said(_repeat), 0.03),
    (_remember, 0.03),
)
TOOL_WISHING: tuple[tuple[Kind, float], ...] = (
    (_said(_look_up), 0.03),
    (_said(_sum), 0.06),
    (_said(_unknown), 0.04),
    (_said(_city), 0.02),
)
