"""Server-sent events, on the reading side."""

from collections.abc import Iterator

from .wire import ProtocolError

MAX_EVENT_BYTES = 16 * 2**20


class SSEDecoder:
    """Turns bytes, cut anywhere, into the data of server-sent events (WHATWG HTML, section 9.2).

    Comments and the fields `event`, `id` and `retry` are dropped; several data lines of one event are joined by line
    feeds; an event that was not ended by an empty line is not an event. Work and memory are linear in the input.
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []  # pieces of a line whose end has not come
        self._num_line_bytes = 0
        self._data: list[bytes] = []  # data lines of an event whose end has not come
        self._num_data_bytes = 0
        self._ended_with_cr = False
        self._is_at_start = True

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the data of each event that `chunk` completes."""
        if self._ended_with_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._ended_with_cr = False
        for piece in chunk.splitlines(keepends=True):
            self._ended_with_cr = piece.endswith(b"\r")
            self._line.append(piece)
            self._num_line_bytes += len(piece)
            if self._num_line_bytes + self._num_data_bytes > MAX_EVENT_BYTES:
                raise ProtocolError(f"the stream holds an event of more than {MAX_EVENT_BYTES} bytes")
            if not piece.endswith((b"\n", b"\r")):
                continue
            data = self._take_line(b"".join(self._line).rstrip(b"\r\n"))
            self._line.clear()
            self._num_line_bytes = 0
            if data is not None:
                yield data

    def _take_line(self, line: bytes) -> str | None:
        """Return the data of the event that `line` ends, if it ends one."""
        if self._is_at_start:
            self._is_at_start = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._num_data_bytes += len(line)
            return None
        if not self._data:
            return None
        data = b"\n".join(self._data).decode("utf-8", errors="replace")
        self._data.clear()
        self._num_data_bytes = 0
        return data
