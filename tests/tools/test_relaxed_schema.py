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
    assert relaxed(schema, 1) == first
    assert relaxed(schema, 2) == second
    assert repr(schema) == sent, "the schema that was sent is what answers are checked against"
