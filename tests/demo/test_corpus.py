"""The corpus: what is held out stays out of training, calls follow from what the user said, sums are right."""

import json
import re
from itertools import pairwise

import jsonschema
import pytest

from lmdserve.demo.corpus.arithmetic import Operation, arithmetic_dialogue, evaluate, steps, written
from lmdserve.demo.corpus.catalogue import concepts
from lmdserve.demo.corpus.dialogue import Dialogue, render
from lmdserve.demo.corpus.mixture import make_dialogue
from lmdserve.demo.corpus.resources import lexicon
from lmdserve.demo.corpus.source import Source, Split, split_of
from lmdserve.demo.corpus.stories import tell
from lmdserve.demo.corpus.toolbox import offer
from lmdserve.tools.schema import normalize_tools

NUM_DIALOGUES = 1500


def dialogues(split: Split, seed: int, count: int = NUM_DIALOGUES) -> list[Dialogue]:
    source = Source(seed, split)
    return [make_dialogue(source) for _ in range(count)]


@pytest.fixture(scope="module")
def train() -> list[Dialogue]:
    return dialogues(Split.TRAIN, seed=1)


@pytest.fixture(scope="module")
def held_out() -> list[Dialogue]:
    return dialogues(Split.HELD_OUT, seed=1)


def test_a_seed_gives_the_same_dialogues_again(train: list[Dialogue]) -> None:
    again = dialogues(Split.TRAIN, seed=1, count=50)
    other = dialogues(Split.TRAIN, seed=2, count=50)
    assert [render(dialogue) for dialogue in again] == [render(dialogue) for dialogue in train[:50]]
    assert [render(dialogue) for dialogue in again] != [render(dialogue) for dialogue in other]


def test_no_function_name_is_in_both_splits(train: list[Dialogue], held_out: list[Dialogue]) -> None:
    for split, samples in ((Split.TRAIN, train), (Split.HELD_OUT, held_out)):
        names = {tool["name"] for dialogue in samples for tool in dialogue.tools}
        assert len(names) > 500
        assert {split_of(name) for name in names} == {split}


def test_invented_words_belong_to_their_split_alone() -> None:
    for split in Split:
        source = Source(3, split)
        assert {split_of(source.invented()) for _ in range(3000)} == {split}
        assert {split_of(source.lexeme()) for _ in range(3000)} == {split}


def test_about_an_eighth_of_the_words_is_held_out() -> None:
    share = sum(split_of(word) is Split.HELD_OUT for word in lexicon()) / len(lexicon())
    assert 0.09 < share < 0.16


def test_held_out_concepts_share_no_name_with_the_others() -> None:
    names = {split: {name for concept in concepts(split) for name in concept.names} for split in Split}
    assert names[Split.HELD_OUT]
    assert not names[Split.TRAIN] & names[Split.HELD_OUT]


@pytest.mark.parametrize("split", list(Split))
def test_catalogue_requests_use_their_parameters(split: Split) -> None:
    for concept in concepts(split):
        keys = {parameter.key for parameter in concept.parameters}
        required = {parameter.key for parameter in concept.parameters if parameter.required}
        for requests in concept.requests.values():
            assert requests
            for request in requests:
                used = set(re.findall(r"\{(\w+)\}|\[\?(\w+)", request))
                mentioned = {key or boolean for key, boolean in used}
                assert required <= mentioned <= keys, request


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("split", list(Split))
def test_calls_fit_the_schema_and_hold_what_was_said(split: Split, language: str) -> None:
    """Every string argument that is no word of an enum stands in the request, and required ones are all given."""
    source = Source(4, split)
    num_checked = 0
    for _ in range(300):
        for tool in offer(source, language):
            text, arguments = tool.request(source, language)
            schema = tool.schema["parameters"]
            assert list(arguments) == [name for name in schema["properties"] if name in arguments]
            assert set(schema.get("required", [])) <= set(arguments), text
            enums = {slot.name for slot in tool.slots if slot.enum}
            for name, value in arguments.items():
                expected = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
                assert isinstance(value, expected[schema["properties"][name]["type"]])
                if isinstance(value, str) and name not in enums:
                    assert value in text
                    num_checked += 1
    assert num_checked > 500


def test_turns_alternate_and_every_call_has_a_result(train: list[Dialogue]) -> None:
    for dialogue in train:
        roles = [turn.role for turn in dialogue.turns]
        names = {tool["name"] for tool in dialogue.tools}
        for position, turn in enumerate(dialogue.turns):
            if turn.role == "user":
                assert roles[position + 1] == "assistant"
            if turn.role == "assistant":
                count = len(turn.calls)
                following = roles[position + 1 : position + 2 + count]
                assert following[:count] == ["tool"] * count
                assert "tool" not in following[count:]
            assert all(call.name in names for call in turn.calls)


def test_all_kinds_of_dialogues_come_in_both_languages(train: list[Dialogue]) -> None:
    found = {(dialogue.category, dialogue.language) for dialogue in train}
    assert found == {
        (kind, tongue) for kind in ("tools", "chain", "arithmetic", "chat", "plain") for tongue in ("en", "zh")
    }


def test_expressions_keep_their_meaning_when_written() -> None:
    nested = Operation("*", Operation("+", 3, 5), Operation("-", 4, Operation("-", 2, 1)))
    assert written(nested, spaced=False) == "(3+5)*(4-(2-1))"
    assert evaluate(nested) == 24
    assert steps(nested) == [("+", 3, 5), ("-", 2, 1), ("-", 4, 1), ("*", 8, 3)]


def test_written_expressions_evaluate_to_the_answer() -> None:
    """Python's own arithmetic reads the question; the number in the last answer must be its value."""
    source = Source(5, Split.TRAIN)
    num_checked = 0
    for _ in range(400):
        turns = arithmetic_dialogue(source, "en").turns
        questions = [position for position, turn in enumerate(turns) if turn.role == "user"]
        for begin, end in pairwise([*questions, len(turns)]):
            question = turns[begin].content.replace("×", "*").replace("÷", "/")
            expression = re.search(r"[\d(][\d+\-*/(). ]*[+*/-][\d+\-*/(). ]*[\d)]", question)
            answer = re.fullmatch(r"(?:The result is|The answer is|It is) (-?[\d.]*\d)\.", turns[end - 1].content)
            if expression and answer and turns[begin + 1].calls:
                value = eval(expression[0])  # digits, operators and parentheses only, by the pattern above
                assert float(answer[1]) == pytest.approx(value, abs=1e-2, rel=1e-3)
                num_checked += 1
    assert num_checked > 200


@pytest.mark.parametrize(("language", "one", "two"), [("en", "fox", "watermelon"), ("zh", "狐狸", "西瓜")])
def test_stories_name_both_things_and_end(language: str, one: str, two: str) -> None:
    source = Source(6, Split.TRAIN)
    for living in (True, False):
        for _ in range(50):
            story = tell(source, language, one, two, living=living)
            assert one in story
            assert two in story
            assert story[-1] in ".。"
            assert "{" not in story


def test_rendered_dialogues_have_no_loose_slots(train: list[Dialogue]) -> None:
    for dialogue in train:
        text = render(dialogue)
        assert text.startswith("<s>")
        assert "\0" not in text
        assert not re.search(r"\{(noun|verb|item|topic|name|entity|thing|base)\}", text)


def test_a_call_renders_as_internlm2_writes_it() -> None:
    dialogue = Dialogue("tools", "zh", tools=[{"name": "f", "parameters": {"type": "object", "properties": {}}}])
    source = Source(7, Split.TRAIN)
    sample = next(
        item for item in (make_dialogue(source) for _ in range(500)) if any(turn.calls for turn in item.turns)
    )
    call = next(turn.calls[0] for turn in sample.turns if turn.calls)
    body = json.dumps({"name": call.name, "parameters": call.arguments}, ensure_ascii=False)
    assert f"<|action_start|><|plugin|>\n{body}<|action_end|>" in render(sample)
    dialogue.say("问", "答")
    assert render(dialogue) == (
        '<s><|im_start|>system name=<|plugin|>\n[{"name": "f", "parameters": {"type": "object", "properties": {}}}]'
        "<|im_end|>\n<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n"
    )


def test_calls_obey_the_schemas_of_their_tools(train: list[Dialogue], held_out: list[Dialogue]) -> None:
    """A grammar keeps an answer from being what is expected where that breaks the tool's own schema."""
    for dialogue in [*train, *held_out]:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in normalize_tools(dialogue.tools)}
        for call in [call for turn in dialogue.turns for call in turn.calls]:
            jsonschema.validate(call.arguments, schemas[call.name])
