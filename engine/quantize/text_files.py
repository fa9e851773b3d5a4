"""Local text files read as documents: .txt, .jsonl and .json (also .gz), .parquet. Knows no data set and no tokens.

A document is a text, or the messages of a chat. Text files are one document each; the others have one a row, in the
field `text`, `content` or `messages`.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..api import ConfigError

Message = dict[str, Any]
Document = str | list[Message]

TEXT_FIELDS = ("text", "content")
CHAT_FIELD = "messages"
_PLAIN_SUFFIXES = (".txt", ".md", ".raw", ".text")
_JSON_SUFFIXES = (".jsonl", ".json")
_PARQUET_SUFFIX = ".parquet"
_KNOWN = ", ".join((*_PLAIN_SUFFIXES, *_JSON_SUFFIXES, _PARQUET_SUFFIX))


def is_text_file(path: Path) -> bool:
    """Say whether `read_documents` takes a file of this name."""
    return _suffix(path) in (*_PLAIN_SUFFIXES, *_JSON_SUFFIXES, _PARQUET_SUFFIX)


def read_documents(path: Path, fields: Sequence[str] = (*TEXT_FIELDS, CHAT_FIELD)) -> list[Document]:
    """Return a file's documents in order; those of a row are in the first of `fields` that it has.

    Raises ConfigError, naming the file and the line or row, when it cannot be read as what its name says.
    """
    suffix = _suffix(path)
    try:
        if suffix in _PLAIN_SUFFIXES:
            return [_read_bytes(path).decode("utf-8")]
        if suffix in _JSON_SUFFIXES:
            return list(_from_rows(_json_rows(path), fields, path))
        if suffix == _PARQUET_SUFFIX:
            return list(_from_rows(_parquet_rows(path, fields), fields, path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read ({error}); check the file, or copy it again") from None
    hint = "; unpack it first (zstd -d)" if suffix == ".zst" else ""
    raise ConfigError(f"{path} is of no kind that is read as text; known are {_KNOWN}, also with .gz{hint}")


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    with gzip.open(path) as file:
        return file.read()


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where each row is and what it holds; .json may be one array, or lines as in .jsonl."""
    data = _read_bytes(path)
    if data.lstrip()[:1] == b"[":
        try:
            rows = json.loads(data)
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON ({error}); check the file") from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is no JSON ({error}); check the file") from None


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(
            f"{path} is a parquet file, and reading those takes pyarrow; install it (pip install pyarrow), or give the "
            "text as .jsonl or .txt"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in fields if name in file.schema_arrow.names][:1]
        batches = (batch.to_pylist() for batch in file.iter_batches(columns=columns or None))
        rows = (row for batch in batches for row in batch)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    except ArrowException as error:
        raise ConfigError(f"{path} cannot be read as parquet ({error}); copy it again") from None


def _from_rows(rows: Iterator[tuple[str, Any]], fields: Sequence[str], path: Path) -> Iterator[Document]:
    for place, row in rows:
        value = row
        if isinstance(row, Mapping):
            value = next((row[name] for name in fields if row.get(name) is not None), None)
        if not isinstance(value, str) and not _is_chat(value):
            raise ConfigError(
                f"{path}, {place} has no text: a row is a string, or an object with one of {', '.join(fields)}"
            )
        yield value


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )
