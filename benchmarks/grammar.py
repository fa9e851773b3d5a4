"""What grammars cost: compiling the schemas of tools, and the mask of each token, on a given tokenizer.

`python benchmarks/grammar.py TOKENIZER_FOLDER`. Replies are drawn at random from the masks, token by token, as an
engine with a model of random weights would. One thread.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "server"))

from schema_samples import WRITTEN, random_schema, tool

from lmdserve.server.text import Tokenizer
from lmdserve.tools.call_grammar import CallGrammar
from lmdserve.tools.call_syntax import CallSyntax
from lmdserve.tools.constraint import ReplyRules, TokenSets
from lmdserve.tools.grammar import Grammar, GrammarCompiler, Vocabulary
from lmdserve.tools.schema import normalize_tools

SYNTAX = CallSyntax(before_name='{"name": ', after_name=', "parameters": ', after_arguments="}")
MAX_TOKENS = 300


def main() -> None:
    """Print one table of compile times and one of mask times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with tokenizer.json or tokenizer.model, and config.json")
    parser.add_argument("--num-toolboxes", type=int, default=200, help="each of one to four tools")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.folder)
    vocabulary = _vocabulary(tokenizer)
    begun = time.perf_counter()
    compiler, sets = GrammarCompiler(vocabulary), TokenSets(vocabulary)
    grammars, compile_s = [], []
    for index, tools in enumerate(_toolboxes(options.num_toolboxes)):
        grammar, seconds = _compile(compiler, tools)
        grammars.append(grammar)
        compile_s.append(seconds if index else time.perf_counter() - begun)
    print(f"vocabulary {tokenizer.vocab_size}; first grammar, with the tokenizer's tables: {compile_s[0] * 1e3:.0f} ms")
    print("| what | number | p50 | p90 | p99 | max |\n|---|---|---|---|---|---|")
    _print_row("compile, ms", compile_s[1:], 1e3)
    first_s, mask_s, accept_s = [], [], []
    for index, grammar in enumerate(grammars):
        times = list(_follow(ReplyRules(sets=sets, answer=grammar), random.Random(index)))
        first_s.append(times[0][0])
        mask_s += [mask for mask, _ in times[1:]]
        accept_s += [accept for _, accept in times]
    _print_row("first mask, us", first_s, 1e6)
    _print_row("later masks, us", mask_s, 1e6)
    _print_row("accept, us", accept_s, 1e6)


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(
        token_bytes=[tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)],
        control_ids=frozenset({*tokenizer.control_tokens.values(), *tokenizer.eos_token_ids}),
        end_ids=tuple(sorted(tokenizer.eos_token_ids)),
        encode=lambda text: tokenizer.encode_segments(["", text]),
    )


def _toolboxes(count: int) -> Iterator[Sequence[Any]]:
    rng = random.Random(0)
    for _ in range(count):
        schemas = [rng.choice(WRITTEN) if rng.random() < 0.3 else random_schema(rng) for _ in range(rng.randint(1, 4))]
        yield normalize_tools([tool(f"function_{place}", schema) for place, schema in enumerate(schemas)])


def _compile(compiler: GrammarCompiler, tools: Sequence[Any]) -> tuple[Grammar, float]:
    begun = time.perf_counter()
    grammar = compiler.compile(CallGrammar(syntax=SYNTAX, tools=tools, control_ids={}).source(has_opener=True))
    return grammar, time.perf_counter() - begun


def _follow(rules: ReplyRules, rng: random.Random) -> Iterator[tuple[float, float]]:
    """Yield the seconds of mask and accept for each token of one reply, drawn from the masks."""
    constraint = rules.new_constraint()
    for _ in range(MAX_TOKENS):
        begun = time.perf_counter()
        mask = constraint.mask()
        masked = time.perf_counter()
        assert mask is not None
        bits = int.from_bytes(mask, "little")
        token_id = _draw(bits, rng)
        accepting = time.perf_counter()
        constraint.accept(token_id)
        yield masked - begun, time.perf_counter() - accepting
        if constraint.is_over:
            return


def _draw(bits: int, rng: random.Random) -> int:
    """Return an allowed token near a random place."""
    above = bits >> (place := rng.randrange(bits.bit_length()))
    return place + (above & -above).bit_length() - 1


def _print_row(what: str, seconds: Sequence[float], scale: float) -> None:
    in_order = sorted(seconds)
    cells = [in_order[min(len(in_order) - 1, int(len(in_order) * share))] * scale for share in (0.5, 0.9, 0.99, 1.0)]
    print(f"| {what} | {len(seconds)} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
