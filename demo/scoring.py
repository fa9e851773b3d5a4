"""Held-out cases and how an answer to one is judged; who answers them is not decided here.

Every assistant turn of a held-out dialogue is one case: the conversation up to it, with the right history, and the turn
that should follow. A call counts only when name and arguments are equal to the expected ones.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .corpus.dialogue import Call, Dialogue, Json, Turn, call_json, render
from .corpus.errands import OK_RESULTS
from .corpus.mixture import make_dialogue
from .corpus.source import Source, Split

ACTION = re.compile(r"<\|action_start\|><\|plugin\|>\n?(.*?)<\|action_end\|>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Case:
    """One turn to predict. `kind` is call, many_calls, next_call (after a result), from_result or no_call."""

    category: str
    language: str
    kind: str
    turns: tuple[Turn, ...]
    tools: list[Json]
    expected: Turn

    @property
    def group(self) -> tuple[str, str]:
        return self.category, self.language

    @property
    def prompt(self) -> str:
        """The prompt as text with control tokens."""
        dialogue = Dialogue(self.category, self.language, list(self.turns), self.tools)
        return render(dialogue) + "<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`right` is the score of the case; `decided` says whether calling or not was right."""

    case: Case
    right: bool
    decided: bool
    answer: str

    def report(self) -> str:
        """Return one line of JSON that shows what was asked, expected and answered."""
        expected = self.case.expected.content + "".join(map(call_json, self.case.expected.calls))
        names = [tool["name"] for tool in self.case.tools]
        return json.dumps(
            {"tools": names, "asked": self.case.turns[-1].content, "expected": expected, "answered": self.answer},
            ensure_ascii=False,
        )


def held_out_cases(count: int, seed: int) -> list[Case]:
    """Return `count` cases from dialogues whose names and invented values training never sees."""
    source = Source(seed, Split.HELD_OUT)
    cases: list[Case] = []
    while len(cases) < count:
        dialogue = make_dialogue(source)
        if dialogue.tools:
            cases.extend(_cases_of(dialogue))
    return cases[:count]


def _cases_of(dialogue: Dialogue) -> list[Case]:
    cases = []
    for index, turn in enumerate(dialogue.turns):
        if turn.role == "assistant":
            kind = _kind(dialogue.turns[index - 1], turn)
            cases.append(
                Case(dialogue.category, dialogue.language, kind, tuple(dialogue.turns[:index]), dialogue.tools, turn)
            )
    return cases


def _kind(before: Turn, turn: Turn) -> str:
    if before.role == "tool":
        return "next_call" if turn.calls else "from_result"
    if not turn.calls:
        return "no_call"
    return "call" if len(turn.calls) == 1 else "many_calls"


def parse_output(text: str) -> tuple[str, list[Call] | None]:
    """Split raw model output into text and calls; None when a block is not a call."""
    calls = []
    for body in ACTION.findall(text):
        try:
            value = json.loads(body)
            calls.append(Call(value["name"], value["parameters"]))
        except (ValueError, KeyError, TypeError):
            return text, None
    return ACTION.sub("", text), calls


def judge(case: Case, content: str, calls: Sequence[Call] | None) -> Verdict:
    """Compare an answer with what was expected."""
    expected = list(case.expected.calls)
    answer = content + "".join(map(call_json, calls or ()))
    decided = calls is not None and bool(calls) == bool(expected)
    if expected:
        return Verdict(case, calls is not None and _same(list(calls), expected), decided, answer)
    if case.kind == "from_result":
        return Verdict(case, decided and all(fact in content for fact in _facts(case)), decided, answer)
    return Verdict(case, decided, decided, answer)


def _same(one: list[Call], two: list[Call]) -> bool:
    def text(calls: list[Call]) -> list[str]:
        return [json.dumps([call.name, call.arguments], sort_keys=True) for call in calls]

    return text(one) == text(two)


def _facts(case: Case) -> list[str]:
    """Return what an answer must contain: every value in the results since the last question that it is about."""
    results: list[str] = []
    for turn in reversed(case.turns):
        if turn.role != "tool":
            break
        results.append(turn.content)
    facts = [fact for result in results for fact in _facts_of(result)]
    return [fact for fact in facts if fact in case.expected.content]


def _facts_of(result: str) -> list[str]:
    if result in OK_RESULTS:
        return []
    try:
        value = json.loads(result)
    except ValueError:
        return [re.sub(r"^(Error|error|result): |^.*=\s*", "", result)]
    return _leaves(value)


def _leaves(value: Json) -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() if key not in ("status", "success", "ok") for leaf in _leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value if isinstance(value, str) else json.dumps(value)]


def table(verdicts: list[Verdict]) -> str:
    """Return the scores by kind, by category and language, and over all calls."""
    lines = [f"{'':<28}{'right':>8}{'decided':>9}{'cases':>7}"]
    calls = [verdict for verdict in verdicts if verdict.case.expected.calls]
    lines.append(_line("all calls (exact)", calls))
    lines += [
        _line(f"kind {kind}", [verdict for verdict in verdicts if verdict.case.kind == kind])
        for kind in ("call", "many_calls", "next_call", "from_result", "no_call")
    ]
    groups = sorted({(verdict.case.category, verdict.case.language) for verdict in calls})
    lines += [
        _line(
            f"calls, {category} {language}",
            [verdict for verdict in calls if verdict.case.group == (category, language)],
        )
        for category, language in groups
    ]
    return "\n".join(lines)


def _line(title: str, verdicts: list[Verdict]) -> str:
    count = len(verdicts)
    if not count:
        return f"{title:<28}{'-':>8}{'-':>9}{0:>7}"
    right = sum(verdict.right for verdict in verdicts) / count
    decided = sum(verdict.decided for verdict in verdicts) / count
    return f"{title:<28}{right:>8.1%}{decided:>9.1%}{count:>7}"


def call_accuracy(verdicts: list[Verdict]) -> float:
    """Return the share of exact calls among the cases that need one."""
    calls = [verdict.right for verdict in verdicts if verdict.case.expected.calls]
    return sum(calls) / max(1, len(calls))
