"""A client that is nothing but a socket: shows the bytes of a reply as they arrive, and can stop reading or hang up."""

import asyncio
import json
import socket
from typing import Any, Self
from urllib.parse import urlsplit


class RawClient:
    """One connection. Use as an async context manager."""

    def __init__(self, url: str, *, receive_buffer_bytes: int | None = None) -> None:
        self._url = urlsplit(url)
        self._receive_buffer_bytes = receive_buffer_bytes

    async def __aenter__(self) -> Self:
        connection = socket.socket()
        connection.setblocking(False)
        if self._receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer_bytes)
        await asyncio.get_running_loop().sock_connect(connection, (self._url.hostname, self._url.port))
        limit = self._receive_buffer_bytes or 2**20
        self.reader, self.writer = await asyncio.open_connection(sock=connection, limit=limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connection at once, unread data and all."""
        self.writer.transport.abort()

    async def post(self, path: str, body: dict[str, Any]) -> None:
        """Send a request and return without waiting for its reply."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        self.writer.write(head.encode() + b"\r\n\r\n" + data)
        await self.writer.drain()

    async def read_head(self) -> tuple[int, dict[str, str]]:
        """Return the status and the headers, names in lower case."""
        status_line, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        return int(status_line.split()[1]), {name.lower(): value for name, value in pairs}

    async def read_chunk(self) -> bytes:
        """Return the next chunk of a chunked body: what the server wrote in one go; b"" at the end."""
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size)
        assert await self.reader.readexactly(2) == b"\r\n"
        return data

    async def read_rest(self) -> bytes:
        """Return the rest of a chunked body."""
        parts = []
        while part := await self.read_chunk():
            parts.append(part)
        return b"".join(parts)
