"""Compiles what a reply must look like (a JSON schema, a regex, a Lark grammar, a choice) into a grammar over tokens.

Owns the limits that keep any input's cost bounded, and the rule for what cannot be enforced: the strict grammar comes
first; where a keyword has none, lenient ones that leave it out follow, and say so, or it is refused. llguidance does
the work, and is imported when the first grammar is compiled. Where a grammar begins and ends within a reply belongs to
`constraint.py`.
"""

import functools
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .json_schema import MAX_NESTING, is_nested_deeper_than
from .relaxed_schema import NUM_HARMLESS_STEPS, NUM_STEPS, relaxed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE_CHARS = 512 * 1024  # of one grammar, schemas of its tools included; 2000 properties are 150 KiB
# Texts that grammars force, with their tokens: the same ones come back with every call of a tool. 6 us less a token.
MAX_REMEMBERED_TEXTS, MAX_REMEMBERED_CHARS = 4096, 256
MAX_CACHED = 128  # compiled grammars
MAX_CACHED_CHARS = 4 * 2**20  # of their sources; a compiled one takes about 25 bytes for each, so 100 MiB in all
# Half to a twentieth of llguidance's defaults: with these the costliest mask found for a hostile regex took 70 ms (then
# the request fails), with the defaults 950 ms; 884 real schemas need none of the difference.
_LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 20_000,
    "step_max_items": 10_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
# Bounded, so that no model can fill its answer with blanks; the deepest indentation in use stays below.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
ANY_SPACING: Mapping[str, Any] = {"whitespace_pattern": _WHITESPACE}
# Of calls: what all templates write. It leaves one text between two values, which then goes without a step a token.
TEMPLATE_SPACING: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
_SIGNS_OF = {  # in llguidance's messages
    "Unknown format: ": "format",
    "oneOf constraints are not supported": "oneOf",
    "lookarounds not supported": "pattern",
    "patternProperty regexes": "patternProperties",
    "circular references with sibling keys": "$ref",
    "min/maxProperties only supported": "minProperties and maxProperties",
}
_ERROR_NOISE = re.compile(
    r"^at \d+\(\d+\): |failed to compile JSON schema: |\s*<(?:state|non-verbose/)>.*|\s+\d+ \| .*", re.DOTALL
)
_SHOWN_ERROR_CHARS = 300
_NUM_TRIED_TOKENS = 8
# Masks of real schemas take 0.03 ms, one in a thousand 50; a regex of nested counts can take 60 each time, and the
# engine waits for it. A reply may spend this much on masks beyond what each has free, in CPU time of the thread.
FREE_MASK_S = 0.005
MASK_BUDGET_S = 0.25
LONG_S = 0.001
MAX_COUNTED_S = 0.1  # of one mask: where a busy host stops a virtual machine, its threads' clocks go on


class GrammarError(ValueError):
    """A grammar that cannot be compiled, in one sentence; `keywords` are the schema keywords at fault, if they are."""

    def __init__(self, message: str, keywords: Collection[str] = ()) -> None:
        super().__init__(message)
        self.keywords = tuple(keywords)


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """What to compile. Sources that are equal compile to the same grammar.

    `text` is in Lark's notation; `relaxed` returns it with keywords left out, by the steps of `relaxed_schema.py`.
    `must_be_strict`: by those only that leave out what says nothing.
    """

    text: str
    relaxed: Callable[[int], str] | None = field(default=None, compare=False)
    must_be_strict: bool = True


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as grammars see it: each id's bytes, the ids that are no text, and those that may end a reply.

    `encode` gives the ids of a text that goes on: where a grammar leaves one text only, its tokens are those.
    """

    token_bytes: Sequence[bytes]
    control_ids: frozenset[int]
    end_ids: tuple[int, ...]
    encode: Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar. `unenforced` are the schema keywords that it leaves out.

    Its matchers share an automaton. Whoever uses one of them holds `lock`: else native code would wait for another
    one's mask with Python's lock held, and so would everybody.
    """

    prototype: "LLMatcher"
    unenforced: tuple[str, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @property
    def is_spent(self) -> bool:
        """Whether its replies, which share one automaton, have together reached the limit of its states."""
        trial = self.new_matcher()
        with self.lock:
            trial.compute_bitmask()
            return trial.is_error()

    def new_matcher(self) -> "LLMatcher":
        """Return a matcher at the beginning of the grammar."""
        return self.prototype.deep_copy()


class MaskMeter:
    """Asks the grammar of one reply what may follow, and fails one that takes too long to tell."""

    def __init__(self, num_tokens: int) -> None:
        self._excess_s = self._last_s = 0.0
        self._mask = bytearray(-(-num_tokens // 32) * 4)
        self._mask_address = addressof((c_char * len(self._mask)).from_buffer(self._mask))  # its length never changes

    @property
    def was_long(self) -> bool:
        """Whether the last answer took so long that nothing like it should be asked for with Python's lock held."""
        return self._last_s > LONG_S

    def mask_of(self, matcher: "LLMatcher") -> bytearray:
        """Return the tokens that may follow, a bit each in words of 32, until the next call overwrites them.

        Others run meanwhile. Raises GrammarError where none may follow or the budget is spent.
        """
        begun_s = time.thread_time()
        matcher.unsafe_compute_mask_ptr(self._mask_address, len(self._mask))
        self._book(matcher, begun_s)
        return self._mask

    def forced_by(self, matcher: "LLMatcher") -> list[int]:
        """Return the tokens that have to follow, as far as there is one text only; raise GrammarError likewise.

        This holds Python's lock, unless `mask_of` was asked before, which finds out as well.
        """
        begun_s = time.thread_time()
        token_ids = matcher.compute_ff_tokens()
        self._book(matcher, begun_s)
        return token_ids

    def _book(self, matcher: "LLMatcher", begun_s: float) -> None:
        self._last_s = time.thread_time() - begun_s
        self._excess_s += min(max(0.0, self._last_s - FREE_MASK_S), MAX_COUNTED_S)
        if matcher.is_error():
            raise GrammarError(f"it cannot be followed: {_reason(matcher.get_error())}; simplify it")
        if self._excess_s > MASK_BUDGET_S:
            raise GrammarError("it is too costly to follow; simplify it (nested counts cost most)")


class GrammarCompiler:
    """Compiles and caches grammars for one vocabulary. Safe to call from several threads; a call may take a second."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[GrammarSource, Grammar] = OrderedDict()

    def load(self) -> None:
        """Load what all grammars need, before the first one does; raise GrammarError."""
        self._loaded_tokenizer()

    def compile(self, source: GrammarSource) -> Grammar:
        """Return the grammar of a source; raise GrammarError."""
        with self._lock:
            grammar = self._cache.pop(source, None)
        if grammar is None or grammar.is_spent:
            grammar = self._compile_new(source)
        with self._lock:
            self._cache[source] = grammar
            while len(self._cache) > MAX_CACHED or sum(len(s.text) for s in self._cache) > MAX_CACHED_CHARS:
                self._cache.popitem(last=False)
        return grammar

    def _compile_new(self, source: GrammarSource) -> Grammar:
        if len(source.text) > MAX_SOURCE_CHARS:
            raise GrammarError(
                f"the grammar has {len(source.text)} characters, and at most {MAX_SOURCE_CHARS} are compiled; "
                "shorten it"
            )
        try:
            return Grammar(self._matcher(source.text))
        except GrammarError as error:
            if not error.keywords or source.relaxed is None:
                raise
            return self._compile_relaxed(source.relaxed, NUM_HARMLESS_STEPS if source.must_be_strict else NUM_STEPS)

    def _compile_relaxed(self, relaxed: Callable[[int], str], num_steps: int) -> Grammar:
        keywords: set[str] = set()
        for step in range(1, num_steps + 1):
            try:
                matcher = self._matcher(relaxed(step))
            except GrammarError as error:
                if not error.keywords or step == num_steps:
                    raise
                keywords |= {*error.keywords}
            else:
                break
        if not keywords:
            return Grammar(matcher)
        return Grammar(matcher, tuple(sorted({*keywords, *_left_out(matcher.get_grammar_warnings())})))

    def _matcher(self, text: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self._loaded_tokenizer(), text, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise _explain(matcher.get_error())
        if matcher.is_stopped() and not matcher.is_accepting():
            raise GrammarError("the grammar allows no text at all")
        meter = MaskMeter(len(self.vocabulary.token_bytes))
        meter.mask_of(matcher)  # its copies have the first mask at once, which takes 20 ms for 2000 properties
        _try_out(matcher.deep_copy(), meter)
        return matcher

    def _loaded_tokenizer(self) -> "LLTokenizer":
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _load_tokenizer(self.vocabulary)
            return self._tokenizer


def json_schema_source(schema: Any, *, must_be_strict: bool) -> GrammarSource:
    """Return the source of a JSON value that obeys a schema; raise GrammarError for one that is nested too deeply."""

    def text(step: int) -> str:
        return f"start: {schema_term(schema, step=step)}\n"

    return GrammarSource(text(0), text, must_be_strict)


def schema_term(schema: Any, *, step: int, spacing: Mapping[str, Any] = ANY_SPACING) -> str:
    """Return what stands for a schema's values in a Lark rule, as it is (step 0) or relaxed; raise GrammarError."""
    if schema is False:
        raise GrammarError("the schema is false, which no value obeys")
    if schema is not True and not isinstance(schema, Mapping):
        raise GrammarError("the schema must be a JSON object")
    proper = dict(schema) if isinstance(schema, Mapping) else {}
    if is_nested_deeper_than(proper, MAX_NESTING):
        raise GrammarError(f"the schema is nested deeper than {MAX_NESTING} levels; flatten it")
    if step:
        proper = relaxed(proper, step)
    is_lenient = step > NUM_HARMLESS_STEPS
    options = {**spacing, "lenient": is_lenient, "coerce_one_of": is_lenient}
    return f"%json {json.dumps({**proper, 'x-guidance': options}, ensure_ascii=True)}"


def regex_source(pattern: str) -> GrammarSource:
    """Return the source of a text that matches a whole regular expression (Rust's syntax, without look-around)."""
    from llguidance import LLMatcher

    return GrammarSource(LLMatcher.grammar_from_regex(pattern))


def choice_source(choices: Sequence[str]) -> GrammarSource:
    """Return the source of a text that is one of some."""
    if not choices or not all(choices):
        raise GrammarError("choice needs at least one text, and none of them empty")
    return GrammarSource("start: " + " | ".join(lark_text(choice) for choice in choices) + "\n")


def lark_source(text: str) -> GrammarSource:
    """Return the source that is a Lark grammar already."""
    return GrammarSource(text if text.endswith("\n") else text + "\n")


def lark_text(text: str) -> str:
    """Return a text as a terminal of a Lark rule."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise GrammarError("a text holds a lone surrogate, which no reply can carry")
    return json.dumps(text, ensure_ascii=False)


def _load_tokenizer(vocabulary: Vocabulary) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    if not vocabulary.end_ids:
        raise GrammarError("the served model has no token that ends an answer, so its output cannot be constrained")
    ends = list(vocabulary.end_ids)
    return LLTokenizer(TokenizerWrapper(_WrappedVocabulary(vocabulary)), eos_token=ends)


def _try_out(matcher: "LLMatcher", meter: MaskMeter) -> None:
    """Go on by the first few tokens of some text of the grammar: some turn out to be too costly there only."""
    for _ in range(_NUM_TRIED_TOKENS):
        if matcher.is_stopped():
            break
        mask = int.from_bytes(meter.mask_of(matcher), "little")
        if not mask:
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)
    if matcher.is_error():
        raise _explain(matcher.get_error())


class _WrappedVocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.end_ids[0]
        self.bos_token_id = None
        self.tokens = list(vocabulary.token_bytes)
        self.special_token_ids = sorted(vocabulary.control_ids)
        self._encode = vocabulary.encode
        self._encode_again = functools.lru_cache(MAX_REMEMBERED_TEXTS)(vocabulary.encode)

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("only whole characters are encoded")
        return self._encode_again(text) if len(text) <= MAX_REMEMBERED_CHARS else self._encode(text)


def _explain(error: str) -> GrammarError:
    keywords = _left_out([error])
    if keywords:
        return GrammarError(f"the keyword {', '.join(keywords)} cannot be enforced; leave it out", keywords)
    reason = _reason(error)
    if "JSON schema" in error and "regex parse error" in error:
        return GrammarError(f"the keyword pattern cannot be compiled: {reason}", ("pattern",))
    return GrammarError(f"it cannot be compiled: {reason}")


def _reason(error: str) -> str:
    if "NoExtensionBias" in error:
        return "no text obeys it"
    return " ".join(_ERROR_NOISE.sub("", error).split())[:_SHOWN_ERROR_CHARS]


def _left_out(messages: Sequence[str]) -> tuple[str, ...]:
    """Return the schema keywords that llguidance says it does not know."""
    names: set[str] = set()
    for message in messages:
        for match in _UNIMPLEMENTED.finditer(message):
            names.update(json.loads(match[1]))
        names.update(keyword for sign, keyword in _SIGNS_OF.items() if sign in message)
    return tuple(sorted(names))
