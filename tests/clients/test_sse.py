"""The event decoder against streams written out by hand after the WHATWG rules."""

import pytest

from lmdserve.clients import sse
from lmdserve.clients.sse import SSEDecoder
from lmdserve.clients.wire import ProtocolError

STREAMS = [
    (b"data: one\n\n", ["one"]),
    (b"data: one\r\n\r\ndata: two\r\n\r\n", ["one", "two"]),
    (b"data: one\r\rdata: two\r\r", ["one", "two"]),
    (b"data:no space\n\ndata:  two spaces\n\n", ["no space", " two spaces"]),
    (b"data: first\ndata: second\ndata:\ndata: fourth\n\n", ["first\nsecond\n\nfourth"]),
    (b": comment\n\n: another\ndata: x\n\n", ["x"]),
    (b"event: message\nid: 7\nretry: 10\ndata: x\n\n", ["x"]),
    (b"event: ping\n\ndata: x\n\n", ["x"]),
    (b"data\n\n", [""]),
    (b"data: a:b: c\n\n", ["a:b: c"]),
    (b"database: x\n\n", []),
    (b"\xef\xbb\xbfdata: after a mark\n\n", ["after a mark"]),
    ("data: 狐狸和西瓜 🍉\n\n".encode(), ["狐狸和西瓜 🍉"]),
    ("data: a\u2028b\x0bc\x0cd\x1ee\x85f\n\n".encode(), ["a\u2028b\x0bc\x0cd\x1ee\x85f"]),
    (b"data: complete\n\ndata: not ended\n", ["complete"]),
    (b"data: complete\n\ndata: not even a line", ["complete"]),
    (b"", []),
]


@pytest.mark.parametrize(("stream", "expected"), STREAMS)
def test_a_stream_decodes_the_same_however_it_is_cut(stream: bytes, expected: list[str]) -> None:
    for size in (len(stream) or 1, 1, 2, 3, 5):
        decoder = SSEDecoder()
        found = []
        for start in range(0, len(stream), size):
            found += decoder.feed(stream[start : start + size])
        assert found == expected, f"cut every {size} bytes"


def test_a_line_feed_after_a_block_that_ended_in_a_carriage_return_is_no_empty_line() -> None:
    decoder = SSEDecoder()
    assert list(decoder.feed(b"data: one\r")) == []
    assert list(decoder.feed(b"\ndata: two\r\n\r\n")) == ["one\ntwo"]


@pytest.mark.parametrize("endless", [b"data: " + b"x" * 60, b"data: xxxxxxxxxxxx\n", b"x" * 60, b"data:\n"])
def test_an_event_that_never_ends_is_refused(endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    decoder = SSEDecoder()
    with pytest.raises(ProtocolError, match="more than 1000 bytes"):
        sum(len(list(decoder.feed(endless))) for _ in range(2000))


def test_many_small_events_and_comments_do_not_add_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    decoder = SSEDecoder()
    pieces = [b"data: xx", b"xxx\n", b"\n", b": keep", b"-alive\n\n"]
    assert [event for _ in range(500) for piece in pieces for event in decoder.feed(piece)] == ["xxxxx"] * 500
