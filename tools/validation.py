"""Checks whole JSON texts against JSON schemas, as a process: `python -m lmdserve.tools.validation`.

It reads one JSON object a line, `{"schema": text, "value": text or null}`, and answers each with a line
`{"problem": text or null}`; with no value, the schema itself is checked. It is a process because a schema can make
checking take exponential time, during which nothing else runs in a Python program: whoever started it kills it then.
It reads no remote schema.
"""

import json
import resource
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import jsonschema_rs

MAX_MEMORY_BYTES = 1 << 30
NUM_CACHED_SCHEMAS = 64
_SHOWN_CHARS = 300


def problem_of(schema: str, value: str | None) -> str | None:
    """Return why a schema cannot be checked or a value does not obey it, in one sentence; None: all is well."""
    try:
        validator = _validator(schema)
    except Exception as error:
        return f"the schema cannot be checked: {_first_line(error)}"
    if value is None:
        return None
    try:
        validator.validate(json.loads(value))
    except Exception as error:
        return _first_line(error)
    return None


@lru_cache(NUM_CACHED_SCHEMAS)
def _validator(schema: str) -> "jsonschema_rs.Validator":
    import jsonschema_rs

    parsed: Any = json.loads(schema)
    return jsonschema_rs.validator_for(parsed, validate_formats=True, offline=True)


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "message", None) or error)
    path = "".join(f"[{part!r}]" for part in getattr(error, "instance_path", None) or ())
    return f"{path}: {text}"[:_SHOWN_CHARS] if path else text[:_SHOWN_CHARS]


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer requests until there are no more."""
    for line in source:
        request = json.loads(line)
        problem = problem_of(request["schema"], request["value"])
        sink.write(json.dumps({"problem": problem}).encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    serve(sys.stdin.buffer, sys.stdout.buffer)
