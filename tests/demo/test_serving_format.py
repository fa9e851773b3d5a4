"""What the model was trained on is what the server renders and parses, token by token."""

import pytest

from lmdserve.demo.corpus.dialogue import Dialogue, openai_messages, openai_tools, render
from lmdserve.demo.corpus.mixture import make_dialogue
from lmdserve.demo.corpus.source import Source, Split
from lmdserve.demo.scoring import Case, held_out_cases, judge, parse_output
from lmdserve.server.chat import ChatRenderer
from lmdserve.server.text import Tokenizer
from lmdserve.tools.api import ContentDelta, ControlToken, ToolCallArguments, ToolCallStart
from lmdserve.tools.internlm2 import InternLM2Format
from lmdserve.tools.schema import normalize_tools


@pytest.fixture(scope="module")
def served(model_folder) -> Tokenizer:
    return Tokenizer.load(model_folder)


def chats(count: int) -> list[Dialogue]:
    source = Source(11, Split.TRAIN)
    samples = (make_dialogue(source) for _ in range(10 * count))
    return [sample for sample in samples if sample.turns][:count]


def test_training_text_has_the_ids_that_the_server_renders(model_folder, served, tokenizer) -> None:
    renderer = ChatRenderer.load(model_folder, served)
    for dialogue in chats(400):
        ids = renderer.render(
            openai_messages(dialogue.turns),
            tools=normalize_tools(openai_tools(dialogue.tools)),
            add_generation_prompt=False,
        )
        assert ids == tokenizer.encode(render(dialogue), add_special_tokens=False).ids


def test_prompts_of_cases_have_the_ids_that_the_server_renders(model_folder, served, tokenizer) -> None:
    renderer = ChatRenderer.load(model_folder, served)
    for case in held_out_cases(100, seed=12):
        tools = normalize_tools(openai_tools(case.tools))
        ids = renderer.render(openai_messages(list(case.turns)), tools=tools)
        assert ids == tokenizer.encode(case.prompt, add_special_tokens=False).ids


def test_the_server_parses_trained_calls(served) -> None:
    """The expected output of every case, as tokens, through the server's parser, is judged right."""
    num_calls = 0
    for case in held_out_cases(200, seed=13):
        content, calls = parsed_by_server(served, expected_output(case))
        assert judge(case, content, calls).right
        num_calls += len(calls)
    assert num_calls > 50


def expected_output(case: Case) -> str:
    text = render(Dialogue(case.category, case.language, [*case.turns, case.expected], case.tools))
    return text.removeprefix(case.prompt).removesuffix("<|im_end|>\n")


def parsed_by_server(served: Tokenizer, text: str):
    parser = InternLM2Format().make_parser()
    events = []
    for segment in served.split_control(text):
        pieces = [segment] if isinstance(segment, ControlToken) else list(segment)
        for piece in pieces:
            events += parser.feed(piece)
    events += parser.finish()
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    fragments = [""] * len(names)
    for event in events:
        if isinstance(event, ToolCallArguments):
            fragments[event.index] += event.fragment
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    bodies = (
        f'<|action_start|><|plugin|>\n{{"name": "{name}", "parameters": {fragment}}}<|action_end|>'
        for name, fragment in zip(names, fragments, strict=True)
    )
    _, calls = parse_output("".join(bodies))
    return content, calls


def test_a_wrong_call_is_judged_wrong() -> None:
    case = next(
        case for case in held_out_cases(100, seed=14) if case.kind == "call" and case.expected.calls[0].arguments
    )
    call = case.expected.calls[0]
    assert judge(case, "", [call]).right
    assert not judge(case, "I cannot do that.", []).decided
    assert not judge(case, "", None).right
    assert not judge(case, "", [call, call]).right
    missing = dict(list(call.arguments.items())[1:])
    assert not judge(case, "", [type(call)(call.name, missing)]).right
    assert not judge(case, "", [type(call)(call.name + "x", call.arguments)]).right


def test_an_answer_must_hold_the_values_of_the_result() -> None:
    cases = [case for case in held_out_cases(400, seed=15) if case.kind == "from_result"]
    judged = [(judge(case, case.expected.content, []).right, judge(case, "Hm.", []).right) for case in cases]
    assert all(right for right, _ in judged)
    assert sum(not wrong for _, wrong in judged) > len(cases) / 2
