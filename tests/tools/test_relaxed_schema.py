"""Schemas with less in them: what is left out, where, and that names and data are no keywords."""

from typing import Any

import pytest

from lmdserve.tools.relaxed_schema import relaxed

AROUND = "^(?!x)y$"


@pytest.mark.parametrize(
    ("schema", "first", "second"),
    [
        ({"pattern": AROUND, "minLength": 1}, {"minLength": 1}, {"minLength": 1}),
        ({"pattern": "^[a-z]$"}, {"pattern": "^[a-z]$"}, {"pattern": "^[a-z]$"}),
        (True, True, True),
        ({"format": "int32"}, {}, {}),
        ({"format": "idn-email"}, {"format": "idn-email"}, {"format": "idn-email"}),
        (
            {"properties": {"pattern": {"pattern": AROUND}, "a": {"items": [{"pattern": AROUND}]}}},
            {"properties": {"pattern": {}, "a": {"items": [{}]}}},
            {"properties": {"pattern": {}, "a": {"items": [{}]}}},
        ),
        ({"enum": [{"pattern": AROUND}]}, {"enum": [{"pattern": AROUND}]}, {"enum": [{"pattern": AROUND}]}),
        ({"minProperties": 2, "anyOf": [{"maxProperties": 3}]},) * 2 + ({"anyOf": [{}]},),
        ({"patternProperties": {AROUND: {}, "a": {}}},) + ({"patternProperties": {"a": {}}},) * 2,
        ({"patternProperties": {"a": {}, "b": {}}},) * 2 + ({},),
        ({"$ref": "#/$defs/a", "type": "object", "$defs": {"a": {}}},) * 2
        + ({"$ref": "#/$defs/a", "$defs": {"a": {}}},),
    ],
)
def test_what_is_left_out(schema: Any, first: Any, second: Any) -> None:
    sent = repr(schema)
    assert relaxed(schema, 2) == first
    assert relaxed(schema, 3) == second
    assert repr(schema) == sent, "the schema that was sent is what answers are checked against"


def test_the_first_step_leaves_out_what_says_nothing() -> None:
    schema = {"properties": {"format": {"format": "uint"}, "a": {"format": "date", "pattern": AROUND}}}
    assert relaxed(schema, 1) == {"properties": {"format": {}, "a": {"format": "date", "pattern": AROUND}}}
