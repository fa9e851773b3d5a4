"""Argument values by kind: how a user writes them and what the call must hold.

A value is fresh in nearly every sample, so that copying is the only way to be right.
"""

from collections.abc import Callable

from . import plain_values, text_values
from .source import Language, Source
from .value import Value, hanzi, in_language, joined, quoted

__all__ = ["INTEGERS", "KINDS", "NUMBERS", "Value", "hanzi", "in_language", "joined", "json_type", "quoted"]

KINDS: dict[str, Callable[[Source, Language], Value]] = {
    kind.__name__: kind
    for kind in (
        plain_values.invented,
        plain_values.person,
        plain_values.city,
        plain_values.country,
        plain_values.place,
        plain_values.address,
        plain_values.email,
        plain_values.phone,
        plain_values.username,
        plain_values.date,
        plain_values.time,
        plain_values.moment,
        plain_values.small,
        plain_values.integer,
        plain_values.decimal,
        plain_values.money,
        plain_values.percent,
        plain_values.color,
        plain_values.language_name,
        plain_values.currency,
        plain_values.ticker,
        plain_values.food,
        plain_values.ip,
        plain_values.boolean,
        plain_values.version,
        text_values.code,
        text_values.digits,
        text_values.url,
        text_values.path,
        text_values.file,
        text_values.snippet,
        text_values.formula,
        text_values.title,
        text_values.sentence,
        text_values.symbol,
    )
}
INTEGERS = frozenset({"small", "integer", "percent"})
NUMBERS = frozenset({"decimal", "money"})


def json_type(kind: str) -> str:
    """Return the schema type that a value of this kind has when nothing else is said."""
    if kind in INTEGERS:
        return "integer"
    return "number" if kind in NUMBERS else "boolean" if kind == "boolean" else "string"
