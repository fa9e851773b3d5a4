"""One block of code for an interpreter, turned into the events of a call while it arrives.

OpenAI's API knows functions only, so a block is shown as a call of `code_interpreter` with the arguments
`{"code": "..."}`, or `{"language": "python", "code": "..."}` when a fence names the language. The JSON is written
here, as the code comes in.

Owns what is fence and what is code. A fence is three backticks, the language and a newline in front, three backticks
behind; both are dropped, as are the whitespace around them and the lines before unfenced code. Three backticks inside
fenced code are code unless only whitespace follows them to the block's end.
"""

import json
import re
from collections.abc import Callable, Iterator

from .api import Event, ToolCallArguments, ToolCallEnd, ToolCallStart, new_call_id
from .json_scanner import ScanState

CODE_TOOL_NAME = "code_interpreter"
_FENCE = "```"
_RUNS = re.compile(r"\s+|`|[^\s`]+")


class CodeCall:
    """Takes one block's text; `close` ends it. Any text is code, so nothing but a block without code is refused."""

    in_string = False
    state = ScanState.OPEN

    def __init__(self, indices: Iterator[int]) -> None:
        self.open_index: int | None = None  # of the call that began and has not ended
        self.num_calls = 0  # calls that ended
        self._indices = indices
        self._language: str | None = None
        self._fenced = False
        self._header: list[str] = []  # what came before it was known where the code begins
        self._num_fence_backticks = 0
        self._tail = _Tail()
        self._code: list[str] = []  # code this feed has settled
        self._step: Callable[[str, int], int] = self._leading_whitespace

    def feed(self, text: str, position: int, events: list[Event]) -> int:
        """Take `text` from `position` on and append what it settles to `events`; return `len(text)`."""
        while position < len(text):
            position = self._step(text, position)
        self._flush(events)
        return position

    def close(self, events: list[Event], *, by_marker: bool) -> bool:
        """End the block; return False when there is no code, or when it stops before a marker or closing fence."""
        if not by_marker and not self._tail.ends_with_fence:
            return False
        if 0 < self._num_fence_backticks < len(_FENCE):
            self._begin_unfenced(0)
        self._code.append(self._tail.close())
        self._flush(events)
        if self.open_index is None:
            return False
        events += [ToolCallArguments(self.open_index, '"}'), ToolCallEnd(self.open_index)]
        self.open_index = None
        self.num_calls = 1
        return True

    def _leading_whitespace(self, text: str, position: int) -> int:
        if text[position].isspace():
            self._header.append(text[position])
            return position + 1
        if text[position] == "`":
            self._step = self._opening_fence
            return position
        return self._begin_unfenced(position)

    def _opening_fence(self, text: str, position: int) -> int:
        if text[position] != "`":
            return self._begin_unfenced(position)
        self._num_fence_backticks += 1
        if self._num_fence_backticks == len(_FENCE):
            self._fenced = True
            self._header = []
            self._step = self._language_line
        return position + 1

    def _language_line(self, text: str, position: int) -> int:
        if text[position] == "`":  # the fence is closed on this line, which is code then
            self._begin_code("".join(self._header).lstrip())
            return position
        if text[position] == "\n":
            self._language = "".join(self._header).strip() or None
            self._begin_code("")
        else:
            self._header.append(text[position])
        return position + 1

    def _begin_unfenced(self, position: int) -> int:
        _, newline, indentation = "".join(self._header).rpartition("\n")
        backticks, self._num_fence_backticks = "`" * self._num_fence_backticks, 0
        self._begin_code((indentation if newline else "") + backticks)
        return position

    def _begin_code(self, text: str) -> None:
        self._header = []
        self._step = self._take_code
        self._take_code(text, 0)

    def _take_code(self, text: str, position: int) -> int:
        for run in _RUNS.finditer(text, position):
            self._code.append(self._tail.push(run.group(), may_be_fence=self._fenced))
        return len(text)

    def _flush(self, events: list[Event]) -> None:
        code = "".join(self._code)
        self._code = []
        if not code:
            return
        if self.open_index is None:
            self.open_index = next(self._indices)
            language = f'"language": {_json_string(self._language)}, ' if self._language else ""
            events.append(ToolCallStart(self.open_index, new_call_id(), CODE_TOOL_NAME))
            events.append(ToolCallArguments(self.open_index, f'{{{language}"code": "'))
        events.append(ToolCallArguments(self.open_index, _json_string(code)[1:-1]))


class _Tail:
    """Holds the end of the code that may turn out to be whitespace and a closing fence, which are not code."""

    def __init__(self) -> None:
        self._before: list[str] = []
        self._num_backticks = 0
        self._after: list[str] = []

    @property
    def ends_with_fence(self) -> bool:
        return self._num_backticks == len(_FENCE)

    def push(self, run: str, *, may_be_fence: bool) -> str:
        """Take a run of whitespace, one backtick, or other text; return the text now known to be code."""
        if run.isspace():
            return self._push_whitespace(run)
        if run == "`" and may_be_fence:
            return self._push_backtick()
        return self._release() + run

    def close(self) -> str:
        """Return what is code after all, now that nothing follows: backticks too few to be a fence."""
        if self.ends_with_fence or self._num_backticks == 0:
            return ""
        return self._release()

    def _push_whitespace(self, run: str) -> str:
        if self.ends_with_fence:
            self._after.append(run)
            return ""
        released = self._release() if self._num_backticks else ""
        self._before.append(run)
        return released

    def _push_backtick(self) -> str:
        if not self.ends_with_fence:
            self._num_backticks += 1
            return ""
        if not self._after:  # a fourth backtick
            return self._release() + "`"
        whitespace, self._after = self._after, []
        released = self._release()
        self._before, self._num_backticks = whitespace, 1
        return released

    def _release(self) -> str:
        held = "".join(self._before) + "`" * self._num_backticks + "".join(self._after)
        self._before, self._num_backticks, self._after = [], 0, []
        return held


def _json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
