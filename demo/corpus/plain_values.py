"""Names, places, times, numbers and other short values. One function per kind, all of one signature."""

import string

from . import words
from .source import Language, Source
from .value import Value, hanzi, in_language, same

NUMBER_WORDS = {
    "en": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    "zh": list("一两三四五六七八九十"),
}


TRUE_WORDS = {"en": ("true", "yes", "on"), "zh": ("是", "true", "开")}


FALSE_WORDS = {"en": ("false", "no", "off"), "zh": ("否", "false", "关")}


MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


WEEKDAYS = (
    ("Monday", "星期一"),
    ("Tuesday", "星期二"),
    ("Wednesday", "周三"),
    ("Thursday", "周四"),
    ("Friday", "星期五"),
    ("Saturday", "周六"),
    ("Sunday", "周日"),
)


def invented(source: Source, language: Language) -> Value:
    if language == "zh" and source.chance(0.5):
        return same(hanzi(source, 2, 4))
    word = source.invented()
    return same(source.choice((word, word.capitalize(), word.capitalize(), word.upper())))


def person(source: Source, language: Language) -> Value:
    if language == "zh" and source.chance(0.75):
        return same(source.choice(words.SURNAMES_ZH) + hanzi(source, 1, 2))
    first = source.word(words.FIRST_NAMES) if source.chance(0.5) else source.invented().capitalize()
    if source.chance(0.5):
        return same(first, spaced=False)
    last = source.word(words.LAST_NAMES) if source.chance(0.5) else source.invented().capitalize()
    return same(f"{first} {last}", spaced=False)


def city(source: Source, language: Language) -> Value:
    if source.chance(0.6):
        return same(in_language(source.word(words.CITIES), language), spaced=False)
    if language == "zh" and source.chance(0.8):
        return same(hanzi(source, 1, 3) + source.choice(("市", "县", "镇", "州", "城", "")), spaced=False)
    name = source.invented().capitalize()
    return same(
        source.choice((name, name, name, f"{name} City", f"New {name}", f"{name}ville", f"Port {name}")), spaced=False
    )


def country(source: Source, language: Language) -> Value:
    return (
        same(in_language(source.word(words.COUNTRIES), language)) if source.chance(0.7) else invented(source, language)
    )


def place(source: Source, language: Language) -> Value:
    """A building, street, station or shop."""
    if language == "zh":
        return same(
            hanzi(source, 2, 3)
            + source.choice(("路", "大厦", "车站", "机场", "公园", "医院", "大学", "广场", "酒店", "商场"))
        )
    kind = source.choice(
        ("Street", "Tower", "Station", "Airport", "Park", "Hospital", "University", "Square", "Hotel", "Mall")
    )
    return same(f"{source.invented().capitalize()} {kind}", spaced=False)


def address(source: Source, language: Language) -> Value:
    if language == "zh":
        return same(f"{hanzi(source, 2, 3)}路{source.integer(1, 999)}号")
    kind = source.choice(("Street", "Road", "Avenue", "Lane", "Drive"))
    return same(f"{source.integer(1, 999)} {source.invented().capitalize()} {kind}", spaced=False)


def email(source: Source, language: Language) -> Value:
    separator = source.choice(("", ".", "_", "-"))
    host = source.choice((source.invented(), "example", "mail"))
    user = source.choice(
        (
            source.invented(),
            source.invented() + separator + source.invented(),
            source.invented() + str(source.integer(1, 99)),
        )
    )
    return same(f"{user}@{host}.{source.choice(('com', 'org', 'net', 'io', 'cn'))}")


def phone(source: Source, language: Language) -> Value:
    digits = source.string(string.digits, 10, 11)
    return same(
        source.choice((digits, f"+{source.integer(1, 99)}{digits}", f"{digits[:3]}-{digits[3:7]}-{digits[7:]}"))
    )


def username(source: Source, language: Language) -> Value:
    name = source.invented()
    return same(
        source.choice(
            (
                name,
                f"{name}{source.integer(1, 999)}",
                f"{name}_{source.invented()}",
                f"@{name}",
                f"{name}.{source.invented()}",
            )
        )
    )


def date(source: Source, language: Language) -> Value:
    year, month, day = source.integer(1990, 2039), source.integer(1, 12), source.integer(1, 28)
    iso = f"{year}-{month:02}-{day:02}"
    weekday = in_language(source.choice(WEEKDAYS), language)
    if language == "zh":
        return same(
            source.choice(
                (
                    iso,
                    iso,
                    f"{year}年{month}月{day}日",
                    f"{month}月{day}日",
                    "明天",
                    "今天",
                    "后天",
                    weekday,
                    f"下{weekday}",
                )
            )
        )
    month_name = MONTHS[month - 1]
    forms = (
        iso,
        iso,
        f"{month:02}/{day:02}/{year}",
        f"{month_name} {day}",
        f"{day} {month_name} {year}",
        "tomorrow",
        "today",
        weekday,
        f"next {weekday}",
    )
    return same(source.choice(forms), spaced=False)


def time(source: Source, language: Language) -> Value:
    hour, minute = source.integer(0, 23), source.integer(0, 59)
    clock = f"{hour:02}:{minute:02}"
    if language == "zh":
        return same(
            source.choice(
                (
                    clock,
                    clock,
                    f"上午{source.integer(6, 11)}点",
                    f"下午{source.integer(1, 11)}点",
                    f"{source.integer(1, 12)}点{minute}分",
                )
            )
        )
    return same(
        source.choice(
            (
                clock,
                clock,
                f"{source.integer(1, 12)} pm",
                f"{source.integer(1, 12)}:{minute:02} am",
                f"{source.integer(1, 12)}am",
            )
        ),
        spaced=False,
    )


def moment(source: Source, language: Language) -> Value:
    """A date with a time."""
    day = f"{source.integer(2000, 2039)}-{source.integer(1, 12):02}-{source.integer(1, 28):02}"
    clock = f"{source.integer(0, 23):02}:{source.integer(0, 59):02}"
    return same(source.choice((f"{day} {clock}", f"{day}T{clock}:00", f"{day}T{clock}:00Z")), spaced=False)


def small(source: Source, language: Language) -> Value:
    number = source.integer(1, 10)
    if source.chance(0.25):
        return Value(NUMBER_WORDS[language][number - 1], number)
    number = source.integer(1, 99) if source.chance(0.5) else number
    return Value(str(number), number)


def integer(source: Source, language: Language) -> Value:
    number = source.integer(0, 10 ** source.integer(1, 7))
    number = -number if source.chance(0.1) else number
    return Value(str(number), number)


def decimal(source: Source, language: Language) -> Value:
    digits = source.integer(1, 4)
    number = round(source.random.uniform(0, 10 ** source.integer(0, 4)), digits)
    number = -number if source.chance(0.15) else number
    return Value(repr(number), number) if source.chance(0.85) and "e" not in repr(number) else integer(source, language)


def money(source: Source, language: Language) -> Value:
    number = source.integer(1, 9999) if source.chance(0.5) else round(source.random.uniform(1, 999), 2)
    return Value(f"{number}", number)


def percent(source: Source, language: Language) -> Value:
    number = source.integer(1, 100)
    return Value(source.choice((f"{number}", f"{number}%")), number)


def color(source: Source, language: Language) -> Value:
    if source.chance(0.3):
        return same("#" + source.string("0123456789ABCDEF", 6, 6))
    return same(in_language(source.word(words.COLORS), language))


def language_name(source: Source, language: Language) -> Value:
    return (
        same(in_language(source.word(words.LANGUAGES), language)) if source.chance(0.8) else invented(source, language)
    )


def currency(source: Source, language: Language) -> Value:
    return (
        same(source.word(words.CURRENCIES))
        if source.chance(0.85)
        else same(source.string(string.ascii_uppercase, 3, 3))
    )


def ticker(source: Source, language: Language) -> Value:
    return same(source.word(words.TICKERS)) if source.chance(0.4) else same(source.string(string.ascii_uppercase, 2, 5))


def food(source: Source, language: Language) -> Value:
    return same(in_language(source.word(words.FOODS), language)) if source.chance(0.7) else invented(source, language)


def ip(source: Source, language: Language) -> Value:
    return same(".".join(str(source.integer(0, 255)) for _ in range(4)))


def boolean(source: Source, language: Language) -> Value:
    truth = source.chance(0.5)
    return Value(source.choice((TRUE_WORDS if truth else FALSE_WORDS)[language]), truth)


def version(source: Source, language: Language) -> Value:
    return same(f"{source.choice(('', 'v'))}{source.integer(0, 20)}.{source.integer(0, 30)}.{source.integer(0, 99)}")
