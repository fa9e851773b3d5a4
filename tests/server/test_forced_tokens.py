"""Forced tokens are what the masks would have left anyway, one by one, with a real tokenizer and real grammars."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from schema_samples import WRITTEN, random_schema, tool

import lmdserve
from lmdserve.server.text import Tokenizer
from lmdserve.tools.call_grammar import CallGrammar
from lmdserve.tools.call_syntax import CallSyntax
from lmdserve.tools.constraint import ReplyConstraint, ReplyRules, TokenSets
from lmdserve.tools.grammar import GrammarCompiler, GrammarSource, Vocabulary, json_schema_source, regex_source
from lmdserve.tools.schema import normalize_tools

SYNTAX = CallSyntax(before_name='{"name": ', after_name=', "parameters": ', after_arguments="}")
MAX_TOKENS = 200


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(lmdserve.__file__).parent / "demo" / "model")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    ends = tokenizer.eos_token_ids
    return GrammarCompiler(
        Vocabulary(
            token_bytes=[tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)],
            control_ids=frozenset({*tokenizer.control_tokens.values(), *ends}),
            end_ids=tuple(sorted(ends)),
            encode=lambda text: tokenizer.encode_segments(["", text]),
        )
    )


def _rules(compiler: GrammarCompiler, source: GrammarSource) -> ReplyRules:
    return ReplyRules(sets=TokenSets(compiler.vocabulary), answer=compiler.compile(source))


def _allowed(constraint: ReplyConstraint) -> list[int]:
    mask = constraint.mask()
    assert mask is not None
    return [place for place, bit in enumerate(reversed(f"{int.from_bytes(mask, 'little'):b}")) if bit == "1"]


def _reply(rules: ReplyRules, rng: random.Random) -> tuple[list[int], int]:
    """Follow one reply drawn from the masks; return its tokens, and how many of them were forced."""
    forwarded, stepwise = rules.new_constraint(), rules.new_constraint()
    token_ids: list[int] = []
    num_forced = 0
    while not forwarded.is_over and len(token_ids) < MAX_TOKENS:
        forced: Sequence[int] = forwarded.take_forced()
        for token_id in forced:
            assert _allowed(stepwise) == [token_id]
            stepwise.accept(token_id)
        num_forced += len(forced)
        assert forwarded.must_end == stepwise.must_end
        allowed = _allowed(forwarded)
        assert allowed == _allowed(stepwise)
        token_id = rng.choice(allowed)
        for constraint in (forwarded, stepwise):
            constraint.accept(token_id)
        token_ids += [*forced, token_id]
    return token_ids, num_forced


@pytest.mark.parametrize("seed", range(12))
def test_calls(tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int) -> None:
    rng = random.Random(seed)
    schemas = [rng.choice(WRITTEN) if rng.random() < 0.3 else random_schema(rng) for _ in range(rng.randint(1, 4))]
    tools = normalize_tools([tool(f"function_{place}", schema) for place, schema in enumerate(schemas)])
    source = CallGrammar(syntax=SYNTAX, tools=tools, control_ids={}, is_parallel=False).source(has_opener=True)
    token_ids, num_forced = _reply(_rules(compiler, source), rng)
    assert num_forced > 5, "the call's own text"
    if len(token_ids) < MAX_TOKENS:
        text = b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids[:-1]).decode()
        assert json.loads(text)["name"].startswith("function_")


@pytest.mark.parametrize(
    "source",
    [
        regex_source("(Once upon a time|Once there was) [a-z]{1,3}, the end"),
        regex_source("数字：[0-9]{2}个苹果，你好"),
        json_schema_source(
            {"type": "object", "properties": {"a": {"const": "long text, said once"}}, "required": ["a"]},
            must_be_strict=True,
        ),
    ],
    ids=["regex", "chinese", "schema"],
)
def test_other_grammars(compiler: GrammarCompiler, source: GrammarSource) -> None:
    rules = _rules(compiler, source)
    assert sum(_reply(rules, random.Random(seed))[1] for seed in range(5)) > 10
