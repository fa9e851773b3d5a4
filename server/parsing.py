"""From the bytes of a body to a record of `protocol.py` or `admin_protocol.py`.

Errors name the field, its value and its limit.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import msgspec

from .errors import BadRequestError
from .fields import check_undeclared
from .protocol import SamplingFields

Record = TypeVar("Record", bound=SamplingFields)
Order = TypeVar("Order", bound=msgspec.Struct)

# What a body holds becomes Python values in one go, with Python's lock held: 1 ms for 10,000 lists or objects. A
# conversation or prompt may be as long as a body; no grammar is made of more than this of another field.
MAX_FIELD_BYTES = 512 * 1024
MAX_CONTAINERS = 200_000  # lists and objects; only looked for in bodies above MAX_FIELD_BYTES
_COUNTED_BYTES = 1 << 18  # at a time, so that others get Python's lock in between
_LONG_FIELDS = frozenset({"messages", "prompt"})
SHOWN_VALUE_CHARS = 60
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<in_key>key in )?\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.+)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.+)` - at `\$(?P<path>.*)`$", re.DOTALL)
_LENGTH = re.compile(r"^Expected `(?P<kind>\w+)` of length (?P<limit>.+)$")
_LIMIT = re.compile(r"^Expected `(?:int|float)` (?P<limit>[<>]=? .+)$")
_KINDS = {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false", "array": "a list",
          "object": "an object", "null": "null"}  # fmt: skip
_HINTS = {"messages[].content[].type": "; this server reads text parts only"}


def parse(body: bytes, record_type: type[Record]) -> Record:
    """Return the record that `body` holds, or raise BadRequestError."""
    return read_record(_read_object(body, record_type), record_type)


def read_record(fields: dict[str, Any], record_type: type[Record]) -> Record:
    """Return the record of these fields, which need not come from JSON, or raise BadRequestError."""
    check_undeclared(fields, record_type.__struct_fields__)
    try:
        record = msgspec.convert(fields, record_type)
    except msgspec.ValidationError as error:
        raise _explain(str(error), fields, record_type) from None
    record.check()
    return record


def parse_order(body: bytes, record_type: type[Order]) -> Order:
    """Return the record that `body` holds, where no other fields than the record's are allowed; an empty body is {}."""
    fields = _read_object(body or b"{}", record_type)
    _refuse_unknown(fields, record_type.__struct_fields__)
    try:
        return msgspec.convert(fields, record_type)
    except msgspec.ValidationError as error:
        unknown = _UNKNOWN.match(str(error))
        if unknown:
            param = f"{_param(unknown['path'])}.{unknown['name']}"
            raise BadRequestError(f"{param} is not a field of this request", param=param) from None
        raise _explain(str(error), fields, record_type) from None


def _refuse_unknown(fields: dict[str, Any], known: Collection[str]) -> None:
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the fields are {', '.join(known)}"
            raise BadRequestError(f"{name[:80]} is not a field of this request; {hint}", param=name[:80] or "body")


def _read_object(body: bytes, record_type: type[msgspec.Struct]) -> dict[str, Any]:
    try:
        if len(body) > MAX_FIELD_BYTES:
            _check_size(body)
        fields = msgspec.json.decode(body)
    except msgspec.ValidationError:  # a number that no float holds; decoding by type tells in which field it is
        raise _number_out_of_range(body, record_type) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(
            f"the body is not valid JSON in UTF-8 (NaN and Infinity are not JSON): {error}", param="body"
        ) from None
    except RecursionError:
        raise BadRequestError("the body is nested too deeply to be read", param="body") from None
    if not isinstance(fields, dict):
        raise BadRequestError(f"the body must be a JSON object; got {_describe(fields)}", param="body")
    return fields


def _check_size(body: bytes) -> None:
    """Raise BadRequestError for what would hold up others while it is read; this looks at 16 MB in 25 ms."""
    try:
        sizes = {name: len(raw) for name, raw in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items()}
    except msgspec.ValidationError:
        raise BadRequestError("the body must be a JSON object", param="body") from None
    for name, num_bytes in sizes.items():
        if num_bytes > MAX_FIELD_BYTES and name not in _LONG_FIELDS:
            raise BadRequestError(
                f"{name[:80]}: it has {num_bytes} bytes, and at most {MAX_FIELD_BYTES} of it are read; shorten it",
                param=name[:80] or "body",
            )
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS and _has_more_containers(body, MAX_CONTAINERS):
        raise BadRequestError(
            f"the body holds more than {MAX_CONTAINERS} lists and objects, which is the limit; send fewer", param="body"
        )


def _has_more_containers(body: bytes, limit: int) -> bool:
    """Whether a body of JSON has more lists and objects; brackets in its strings are none."""
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    is_in_string, num_containers = False, 0
    for start in range(0, len(without_escapes), _COUNTED_BYTES):
        parts = without_escapes[start : start + _COUNTED_BYTES].split(b'"')
        num_containers += sum(part.count(b"[") + part.count(b"{") for part in parts[is_in_string::2])
        if num_containers > limit:
            return True
        is_in_string ^= len(parts) % 2 == 0
    return False


def _number_out_of_range(body: bytes, record_type: type[msgspec.Struct]) -> BadRequestError:
    try:
        msgspec.json.decode(body, type=record_type)
    except msgspec.ValidationError as error:
        match = _PATH.match(str(error))
        param = _param(match["path"] or "") if match else ""
        if param:
            return BadRequestError(f"{param}: {match['what']}; send a finite number", param=param)  # type: ignore[index]
    return BadRequestError("the body holds a number that is out of range; send finite numbers", param="body")


def _explain(message: str, fields: dict[str, Any], record_type: type[msgspec.Struct]) -> BadRequestError:
    match = _PATH.match(message)
    assert match is not None, message  # the pattern matches any text
    what, param = match["what"], _param(match["path"] or "")
    missing = _MISSING.match(what)
    if missing:
        param = f"{param}.{missing['name']}" if param else missing["name"]
        return BadRequestError(f"{param} is missing; it is required", param=param)
    value = _value_at(fields, param)
    hint = _HINTS.get(re.sub(r"\d+", "", param), "")
    return BadRequestError(
        f"{param}: expected {_expectation(what, param, record_type)}, got {_describe(value)}{hint}", param=param
    )


def _expectation(what: str, param: str, record_type: type[msgspec.Struct]) -> str:
    """Say what msgspec's message expects in the words of JSON."""
    if what.startswith("Invalid enum value"):
        return "one of " + ", ".join(f'"{name}"' for name in _allowed_values(record_type, param))
    length = _LENGTH.match(what)
    if length:
        unit = "characters" if length["kind"] == "str" else "items"
        return f"{_KINDS[length['kind']]} of {length['limit']} {unit}"
    limit = _LIMIT.match(what)
    if limit:
        return f"a number {limit['limit']}"
    kinds = re.search(r"`(.+?)`", what)
    if kinds is None:
        return what
    return " or ".join(_KINDS.get(kind, kind) for kind in kinds[1].split(" | ") if kind != "null")


def _allowed_values(record_type: type[msgspec.Struct], param: str) -> list[str]:
    """Return the literals that the record allows at `param`, found by walking its type."""
    found: Any = msgspec.inspect.type_info(record_type)
    for step in _steps(param):
        found = next(_children(found, step))
    literal = next(kind for kind in _alternatives(found) if isinstance(kind, msgspec.inspect.LiteralType))
    return [str(value) for value in literal.values]


def _children(kind: Any, step: str | int) -> Iterator[Any]:
    for alternative in _alternatives(kind):
        if isinstance(step, int) and isinstance(alternative, msgspec.inspect.ListType):
            yield alternative.item_type
        elif isinstance(step, str) and isinstance(alternative, msgspec.inspect.StructType):
            yield from (field.type for field in alternative.fields if field.encode_name == step)


def _alternatives(kind: Any) -> Iterator[Any]:
    if isinstance(kind, msgspec.inspect.Metadata):
        kind = kind.type
    if isinstance(kind, msgspec.inspect.UnionType):
        for part in kind.types:
            yield from _alternatives(part)
    else:
        yield kind


def _param(path: str) -> str:
    """Turn msgspec's path into the API's: `.messages[2].content` -> `messages[2].content`."""
    return path.removeprefix(".").replace("[...]", "")


def _steps(param: str) -> list[str | int]:
    return [int(index) if index else name for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", param)]


def _value_at(fields: Any, param: str) -> Any:
    for step in _steps(param):
        fields = fields[step]
    return fields


def _describe(value: Any) -> str:
    """Show a value as JSON, cut to a length that fits a message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)  # not orjson: integers of any size
    return text if len(text) <= SHOWN_VALUE_CHARS else text[:SHOWN_VALUE_CHARS] + "..."
