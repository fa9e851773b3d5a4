"""What grammars cost: compiling the schemas of tools, the mask of each token, and those of all sequences of a step.

`python benchmarks/grammar.py TOKENIZER_FOLDER`. Replies are drawn at random from the masks, token by token, as an
engine with a model of random weights would. Compiling, masks and forced tokens are timed on one thread. A step is what
the engine does between two of its own, until all is known: take every sequence's token, find out what is forced,
compute the next masks. Late are masks that the engine would not wait for. Meanwhile an event loop notes how late it
comes to a timer, with the engine's switch interval.
"""

import argparse
import asyncio
import gc
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "server"))

from schema_samples import WRITTEN, random_schema, tool

from lmdserve.engine.constraints import ConstraintState, MaskThreads
from lmdserve.engine.loop import GIL_SWITCH_INTERVAL_S
from lmdserve.server.text import Tokenizer
from lmdserve.tools.call_grammar import CallGrammar
from lmdserve.tools.call_syntax import CallSyntax
from lmdserve.tools.constraint import ReplyRules, TokenSets
from lmdserve.tools.grammar import Grammar, GrammarCompiler, Vocabulary
from lmdserve.tools.schema import normalize_tools

SYNTAX = CallSyntax(before_name='{"name": ', after_name=', "parameters": ', after_arguments="}")
MAX_TOKENS = 300
BATCH_SIZES = (1, 32, 256)
NUM_STEPS = 300
TICK_S = 0.001


def main() -> None:
    """Print one table of compile times and one of mask times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with tokenizer.json or tokenizer.model, and config.json")
    parser.add_argument("--num-toolboxes", type=int, default=200, help="each of one to four tools")
    options = parser.parse_args()
    sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
    tokenizer = Tokenizer.load(options.folder)
    vocabulary = vocabulary_of(tokenizer)
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
    gc.collect()
    gc.freeze()  # as the server does
    all_rules = [ReplyRules(sets=sets, answer=grammar) for grammar in grammars]
    times = [list(_follow(rules, random.Random(index))) for index, rules in enumerate(all_rules)]
    _print_row("first mask, us", [reply[0].mask_s for reply in times], 1e6)
    _print_row("later masks, us", [token.mask_s for reply in times for token in reply[1:]], 1e6)
    _print_row("forced tokens, us", [token.forced_s for reply in times for token in reply[1:]], 1e6)
    _print_row("accept, us", [token.accept_s for reply in times for token in reply], 1e6)
    notes = []
    for size in BATCH_SIZES:
        cpu_s = -time.process_time()
        steps, held_s = asyncio.run(_step_all(all_rules, size))
        cpu_s += time.process_time()
        _print_row(f"step of {size}, us a sequence", [step.seconds / size for step in steps], 1e6)
        _print_row(f"event loop beside steps of {size} late, us", held_s, 1e6)
        num_late = sum(step.num_late for step in steps)
        notes.append(
            f"steps of {size}: {num_late} masks late, {cpu_s / NUM_STEPS / size * 1e6:.0f} us of CPU a sequence"
        )
    print("; ".join(notes), "(event loop and sampling included)")


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
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


class TokenTimes(NamedTuple):
    """What one sampled token of a reply took."""

    forced_s: float
    mask_s: float
    accept_s: float


def _follow(rules: ReplyRules, rng: random.Random) -> Iterator[TokenTimes]:
    """Yield the times of each token of one reply that is not forced, drawn from the masks."""
    constraint = rules.new_constraint()
    for _ in range(MAX_TOKENS):
        begun = time.perf_counter()
        constraint.take_forced()
        forced = time.perf_counter()
        mask = constraint.mask()
        masked = time.perf_counter()
        token_id = _draw(mask, rng)
        accepting = time.perf_counter()
        constraint.accept(token_id)
        yield TokenTimes(forced - begun, masked - forced, time.perf_counter() - accepting)
        if constraint.is_over:
            return


class Step(NamedTuple):
    """What happened between two steps of an engine."""

    seconds: float
    num_late: int


async def _step_all(all_rules: Sequence[ReplyRules], size: int) -> tuple[list[Step], list[float]]:
    """Return each step of so many replies, and how late the event loop is meanwhile."""
    held_s: list[float] = []
    steps = asyncio.get_running_loop().run_in_executor(None, lambda: list(_steps(all_rules, size)))
    while not steps.done():
        begun = time.perf_counter()
        await asyncio.sleep(TICK_S)
        held_s.append(time.perf_counter() - begun - TICK_S)
    return await steps, held_s


def _steps(all_rules: Sequence[ReplyRules], size: int) -> Iterator[Step]:
    """Yield each step; a reply that is over makes room for another."""
    rng = random.Random(size)
    threads = MaskThreads()
    states = [_new_state(all_rules, rng) for _ in range(size)]
    _prepare(threads, states)
    for _ in range(NUM_STEPS):
        token_ids = [_draw(state.mask, rng) for state in states]
        begun = time.perf_counter()
        for state, token_id in zip(states, token_ids, strict=True):
            state.take([token_id])
        num_late = _prepare(threads, states)
        yield Step(time.perf_counter() - begun, num_late)
        states = [_new_state(all_rules, rng) if state.is_over else state for state in states]
        _prepare(threads, states)
    threads.close()


def _prepare(threads: MaskThreads, states: Sequence[ConstraintState]) -> int:
    """Prepare them all; return how many an engine would not have waited for."""
    threads.prepare(states, is_alone=len(states) == 1)
    num_late = sum(state.is_late for state in states)
    while any(not state.is_ready for state in states):
        threads.wait_for_late()
    threads.note_ready()
    return num_late


def _new_state(all_rules: Sequence[ReplyRules], rng: random.Random) -> ConstraintState:
    return ConstraintState(rng.choice(all_rules).new_constraint(), fast_forward_from=0)


def _draw(mask: bytes | None, rng: random.Random) -> int:
    """Return an allowed token near a random place."""
    assert mask is not None
    bits = int.from_bytes(mask, "little")
    above = bits >> (place := rng.randrange(bits.bit_length()))
    return place + (above & -above).bit_length() - 1


def _print_row(what: str, seconds: Sequence[float], scale: float) -> None:
    cells = [share_of(seconds, share) * scale for share in (0.5, 0.9, 0.99, 1.0)]
    print(f"| {what} | {len(seconds)} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


def share_of(values: Sequence[float], share: float) -> float:
    """Return the value that so many are below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


if __name__ == "__main__":
    main()
