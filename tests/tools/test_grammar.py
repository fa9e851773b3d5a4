"""Compiling: the cache, the lenient fallback, what is refused in which words; and masks against plain membership."""

import json
import random
import re
import time
from typing import Any

import pytest

from lmdserve.tools import grammar as grammar_module
from lmdserve.tools.constraint import ReplyRules, TokenSets, bits_of
from lmdserve.tools.grammar import (
    MAX_CACHED,
    MAX_SOURCE_CHARS,
    GrammarCompiler,
    GrammarError,
    GrammarSource,
    MaskMeter,
    Vocabulary,
    choice_source,
    json_schema_source,
    lark_source,
    regex_source,
)

END = 256
WORDS = (b"ab", b'{"', b'": ', "上海".encode(), "上".encode()[:2], b"  ", b"true")
VOCABULARY = Vocabulary(
    token_bytes=[*(bytes([byte]) for byte in range(256)), b"</s>", b"<x>", *WORDS, b""],
    control_ids=frozenset({END, 257}),
    end_ids=(END,),
    encode=lambda text: list(text.encode()),
)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY)


def _allowed(compiler: GrammarCompiler, source: GrammarSource, text: str) -> set[int]:
    """Return what may follow a text."""
    constraint = ReplyRules(sets=TokenSets(VOCABULARY), answer=compiler.compile(source)).new_constraint()
    for byte in text.encode():
        constraint.accept(byte)
    mask = constraint.mask()
    assert mask is not None
    assert len(mask) == 4 * -(-len(VOCABULARY.token_bytes) // 32)
    return {token_id for token_id in range(8 * len(mask)) if mask[token_id // 8] >> token_id % 8 & 1}


@pytest.mark.parametrize("text", ["", "a", "ab", "上", "上海", "xx"])
def test_a_mask_holds_exactly_the_tokens_that_keep_a_match_possible(compiler: GrammarCompiler, text: str) -> None:
    choices = ["abab", "a", "上海", "上x", "xx true", '{"a": 1}']
    grammar = choice_source(choices)
    expected = {
        token_id
        for token_id, data in enumerate(VOCABULARY.token_bytes)
        if data and token_id not in (END, 257) and any(c.encode().startswith(text.encode() + data) for c in choices)
    }
    # Where one text only is left, the tokens are the tokenizer's own for it, here single bytes.
    allowed = _allowed(compiler, grammar, text)
    left = [choice for choice in choices if choice.startswith(text)]
    if text in choices:
        expected.add(END)
    assert allowed == expected if len(left) > 1 else allowed <= expected | {END}
    assert allowed


def test_control_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    for source in (regex_source("<x>|<y>"), lark_source('start: "<x>" | "<y>"')):
        assert 257 not in _allowed(compiler, source, "")


def test_equal_sources_are_compiled_once_and_old_ones_forgotten() -> None:
    compiler = GrammarCompiler(VOCABULARY)
    first = compiler.compile(regex_source("a"))
    assert compiler.compile(regex_source("a")) is first
    for number in range(MAX_CACHED):
        compiler.compile(regex_source(f"b{number}"))
    assert compiler.compile(regex_source("a")) is not first


@pytest.mark.parametrize(
    ("schema", "keywords"),
    [
        ({"type": "array", "uniqueItems": True}, ("uniqueItems",)),
        ({"not": {"type": "string"}, "type": "integer"}, ("not",)),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, ("oneOf",)),
        ({"type": "string", "format": "idn-email"}, ("format",)),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, ("if", "then")),
        ({"type": "string", "pattern": "^(?!\\.)[a-z.]{2,9}$"}, ("pattern",)),
        ({"patternProperties": {"a": {"type": "string"}, "b": {"type": "null"}}}, ("patternProperties",)),
        ({"properties": {"a": True, "b": True}, "minProperties": 1}, ("minProperties and maxProperties",)),
    ],
)
def test_what_cannot_be_enforced_is_named(compiler: GrammarCompiler, schema: Any, keywords: tuple[str, ...]) -> None:
    assert compiler.compile(json_schema_source(schema, must_be_strict=False)).unenforced == keywords
    with pytest.raises(GrammarError, match=re.escape(keywords[0])) as caught:
        compiler.compile(json_schema_source(schema, must_be_strict=True))
    assert set(caught.value.keywords) <= set(keywords)


def test_a_format_that_the_standard_does_not_know_says_nothing(compiler: GrammarCompiler) -> None:
    for must_be_strict in (True, False):
        schema = {"type": "integer", "format": "int32", "minimum": 0}
        assert compiler.compile(json_schema_source(schema, must_be_strict=must_be_strict)).unenforced == ()


def test_a_schema_cannot_loosen_itself(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(GrammarError, match="uniqueItems"):
        compiler.compile(json_schema_source(schema, must_be_strict=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: json_schema_source({"type": "string", "pattern": "(?=a)"}, must_be_strict=True), "keyword pattern"),
        (lambda: json_schema_source({"type": "integer", "minimum": 2, "maximum": 1}, must_be_strict=False), "minimum"),
        (lambda: json_schema_source({"$ref": "#"}, must_be_strict=False), "no text obeys it"),
        (lambda: json_schema_source(False, must_be_strict=False), "no value obeys"),
        (lambda: json_schema_source([], must_be_strict=False), "must be a JSON object"),
        (lambda: json_schema_source({"const": "\ud800"}, must_be_strict=False), "cannot be compiled"),
        (lambda: choice_source([]), "at least one"),
        (lambda: choice_source(["\ud800"]), "surrogate"),
        (lambda: regex_source("["), "unclosed"),
        (lambda: regex_source("(x{1000}){1000}"), "too many expressions|too costly"),
        (lambda: lark_source("start: b"), "unknown name"),
        (lambda: regex_source("a" * MAX_SOURCE_CHARS), "characters"),
    ],
)
def test_refusals_say_why(compiler: GrammarCompiler, make: Any, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        compiler.compile(make())
    assert len(str(caught.value)) < 500
    assert "x-guidance" not in str(caught.value)


@pytest.mark.parametrize("num_unused", range(40))
def test_masks_are_as_long_as_the_vocabulary_at_the_beginning_and_later(num_unused: int) -> None:
    token_bytes = [*VOCABULARY.token_bytes, *[b""] * num_unused]
    vocabulary = Vocabulary(token_bytes, VOCABULARY.control_ids, VOCABULARY.end_ids, VOCABULARY.encode)
    grammar = GrammarCompiler(vocabulary).compile(regex_source("a[bc]"))
    constraint = ReplyRules(sets=TokenSets(vocabulary), answer=grammar).new_constraint()
    for token_id in b"ab":
        mask = constraint.mask()
        assert mask is not None
        assert len(mask) == 4 * -(-len(token_bytes) // 32)
        constraint.accept(token_id)


def test_a_model_without_an_end_is_told_so() -> None:
    vocabulary = Vocabulary(VOCABULARY.token_bytes, VOCABULARY.control_ids, (), VOCABULARY.encode)
    with pytest.raises(GrammarError, match="no token that ends"):
        GrammarCompiler(vocabulary).compile(regex_source("a"))


def test_a_grammar_that_takes_too_long_at_its_masks_fails() -> None:
    class Slow:
        def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
            end_s = time.thread_time() + 0.06
            while time.thread_time() < end_s:
                pass

        def is_error(self) -> bool:
            return False

    meter, slow = MaskMeter(num_tokens=1), Slow()
    for _ in range(4):
        assert meter.mask_of(slow) == bytes(4)  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="too costly to follow"):
        meter.mask_of(slow)  # type: ignore[arg-type]


def test_a_grammar_that_its_replies_have_used_up_is_compiled_again(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies share the states of one automaton, and its limit: once it was reached, every later reply failed."""
    monkeypatch.setitem(grammar_module._LIMITS, "max_lexer_states", 400)  # type: ignore[index]
    source = regex_source("[a-z]*a[a-z]{12}")
    meter, rng = MaskMeter(len(VOCABULARY.token_bytes)), random.Random(0)

    def follow_many() -> None:
        for _ in range(100):
            matcher = compiler.compile(source).new_matcher()
            for _ in range(40):
                meter.mask_of(matcher)
                matcher.consume_token(ord(rng.choice("ab")))

    with pytest.raises(GrammarError, match="too many states"):
        follow_many()
    with pytest.raises(GrammarError, match="too many states"):
        meter.mask_of(compiler._cache[source].new_matcher())
    meter.mask_of(compiler.compile(source).new_matcher())


def test_blanks_are_bounded(compiler: GrammarCompiler) -> None:
    source = json_schema_source({"type": "array", "items": {"type": "integer"}}, must_be_strict=True)
    assert ord(" ") in _allowed(compiler, source, "[" + " " * 39)
    assert ord(" ") not in _allowed(compiler, source, "[" + " " * 40)
    assert json.loads("[" + " " * 40 + "1]") == [1]


def test_bits() -> None:
    assert bits_of([]) == 0
    assert bits_of([0, 9, 31]) == 1 | 1 << 9 | 1 << 31
