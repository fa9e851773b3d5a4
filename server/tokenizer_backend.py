"""From a checkpoint folder's tokenizer files to everything that encoding and decoding need. Owns which file counts,
what its fields mean, and which tokens are control tokens; encodes and decodes nothing (that is text.py).

`tokenizer.json` is taken where there is one, else `tokenizer.model`; `tokenizer_config.json` adds names and flags. No
code from the checkpoint is run, and class names in its files mean nothing here.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from lmdserve.engine.api import ConfigError

from . import sentencepiece
from .model_folder import read_json_object, tokenizer_file
from .sentencepiece import PieceType, SentencePieceModel
from .token_bytes import DecodingRules, decoding_rules, token_byte_table

# A token that looks like markup steers the model, whether or not its file calls it special (Qwen's <tool_response> is
# not): text must not be able to forge it.
_MARKUP = re.compile(r"<[^<>\s]+>")

_INTERNLM2_VOCAB_SIZE = 92544
_INTERNLM2_CONTROL_TOKENS = {  # the .model calls them [UNUSED_TOKEN_141] .. [UNUSED_TOKEN_146]
    92538: "<|plugin|>",
    92539: "<|interpreter|>",
    92540: "<|action_end|>",
    92541: "<|action_start|>",
    92542: "<|im_end|>",
    92543: "<|im_start|>",
}
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class AddedToken(NamedTuple):
    """A token beside the segmentation model's own; the fields are those of tokenizer files."""

    text: str
    is_special: bool
    swallows_left: bool = False  # white space before it, in a rendered prompt, belongs to it
    swallows_right: bool = False

    @property
    def is_control(self) -> bool:
        """Whether only a template may produce it."""
        return self.is_special or _MARKUP.fullmatch(self.text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerBackend:
    """A loaded tokenizer, in parts. `encoder` and `continuation` never turn text into control tokens that it spells.

    Some tokenizers put a space before a text, but not before what follows a control token within it. For those in
    tokenizer.json form `encoder` does so and `continuation` does not. For SentencePiece the two are one, and
    `text_prefix` is to be put before a text; there, what follows BOS begins a text.
    """

    encoder: tokenizers.Tokenizer
    continuation: tokenizers.Tokenizer
    text_prefix: str
    control_tokens: dict[str, AddedToken]
    control_token_ids: dict[str, int]
    special_token_ids: frozenset[int]  # the control tokens that a reader never sees
    token_bytes: list[bytes]
    rules: DecodingRules
    bos_token_id: int | None
    adds_bos: bool  # plain text begins with BOS by default
    eos_token_ids: frozenset[int]
    named_tokens: dict[str, str]  # bos_token, eos_token ...: their texts, as templates use them


def load_backend(folder: Path) -> TokenizerBackend:
    """Load the tokenizer in `folder`; ConfigError says what is missing or broken."""
    load = _load_tokenizer_json if tokenizer_file(folder).suffix == ".json" else _load_tokenizer_model
    return load(folder, read_json_object(folder / "tokenizer_config.json"))


def _load_tokenizer_json(folder: Path, config: Mapping[str, Any]) -> TokenizerBackend:
    path = folder / "tokenizer.json"
    data = read_json_object(path)
    added = _added_tokens_of_json(data, config)
    data["added_tokens"] = _added_token_records(data.get("added_tokens") or (), added)
    encoder = continuation = _pipeline_from_json(path, data)
    for token_id, token in added.items():
        if encoder.token_to_id(token.text) != token_id:
            raise ConfigError(f"{folder}: {token.text!r} cannot have the id {token_id}; the tokenizer files disagree")
    if (first_only := _first_only_metaspace(data.get("pre_tokenizer"))) is not None:
        first_only["prepend_scheme"] = "never"
        continuation = _pipeline_from_json(path, data)
    named = _named_tokens(config)
    bos_of_processor = _bos_of_post_processor(encoder)
    if bos_of_processor is not None:
        named.setdefault("bos_token", encoder.id_to_token(bos_of_processor) or "")
    adds_bos = config.get("add_bos_token")
    return _backend(
        folder,
        encoder=encoder,
        continuation=continuation,
        text_prefix="",
        added=added,
        rules=decoding_rules(data.get("decoder"), str(path)),
        adds_bos=bos_of_processor is not None if adds_bos is None else bool(adds_bos),
        named=named,
    )


def _added_tokens_of_json(data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens of both files by id; what either file calls special, or gives a role, is special."""
    added = {int(record["id"]): _added_token(record) for record in data.get("added_tokens") or ()}
    for token_id, token in _added_tokens_of_config(config):
        known = added.get(token_id, token)
        added[token_id] = token._replace(is_special=token.is_special or known.is_special)
    vocabulary = (data.get("model") or {}).get("vocab")
    ids = {token.text: token_id for token_id, token in added.items()}
    for text in _named_tokens(config).values():
        named_id = ids.get(text, vocabulary.get(text) if isinstance(vocabulary, dict) else None)
        if named_id is not None:
            added[named_id] = added.get(named_id, AddedToken(text, is_special=True))._replace(is_special=True)
    return added


def _added_token_records(
    records: Iterable[Mapping[str, Any]], added: Mapping[int, AddedToken]
) -> list[Mapping[str, Any]]:
    """Return tokenizer.json's `added_tokens`, with every control token marked special: those stay unmatched in text."""
    known = {int(record["id"]): record for record in records}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {**flags, **known.get(token_id, {}), "id": token_id, "content": token.text, "special": token.is_control}
        for token_id, token in sorted(added.items())
    ]


def _pipeline_from_json(path: Path, data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        pipeline = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} cannot be loaded ({error}); download it again, or update `tokenizers`") from error
    pipeline.no_truncation()
    pipeline.no_padding()
    pipeline.encode_special_tokens = True
    return pipeline


def _first_only_metaspace(pre_tokenizer: object) -> dict[str, Any] | None:
    """Return the step that puts a space before the first span of a text only, if there is one."""
    if not isinstance(pre_tokenizer, dict):
        return None
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        return pre_tokenizer
    return next(filter(None, map(_first_only_metaspace, pre_tokenizer.get("pretokenizers") or ())), None)


def _bos_of_post_processor(encoder: tokenizers.Tokenizer) -> int | None:
    """Return the id that the tokenizer itself puts before a text."""
    before_text = encoder.encode("", add_special_tokens=True).ids
    return before_text[0] if before_text else None


def _load_tokenizer_model(folder: Path, config: Mapping[str, Any]) -> TokenizerBackend:
    model = sentencepiece.read_model(folder / "tokenizer.model")
    added = _added_tokens_of_model(model, config)
    num_known = len(model.pieces)
    if gaps := [i for i in range(num_known, max(added, default=-1) + 1) if i not in added]:
        raise ConfigError(
            f"{folder}/tokenizer_config.json adds tokens beyond the {num_known} of tokenizer.model, but none with the "
            f"id {gaps[0]}; the two files do not belong together"
        )
    pipeline = sentencepiece.convert(model, {token_id: token.text for token_id, token in added.items()})
    named = _named_tokens(config)
    for key, token_id in (("bos_token", model.bos_id), ("eos_token", model.eos_id), ("unk_token", model.unk_id)):
        if token_id in added:
            named.setdefault(key, added[token_id].text)
    return _backend(
        folder,
        encoder=pipeline,
        continuation=pipeline,
        text_prefix=" " if model.add_dummy_prefix else "",
        added=added,
        rules=DecodingRules(
            has_byte_pieces=model.byte_fallback,
            replacements=((sentencepiece.SPACE_SYMBOL, " "),),
            strips_leading_space=model.add_dummy_prefix,
        ),
        adds_bos=bool(config.get("add_bos_token", True)),
        named=named,
    )


def _added_tokens_of_model(model: SentencePieceModel, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the pieces that text must not produce, under the names that the configuration gives them."""
    added = {}
    for token_id, piece in enumerate(model.pieces):
        is_markup = piece.type is PieceType.USER_DEFINED and _MARKUP.fullmatch(piece.text)
        if is_markup or piece.type in (PieceType.CONTROL, PieceType.UNKNOWN):
            added[token_id] = AddedToken(piece.text, is_special=True)
    if len(model.pieces) == _INTERNLM2_VOCAB_SIZE:
        for token_id, text in _INTERNLM2_CONTROL_TOKENS.items():
            if model.pieces[token_id].text.startswith("[UNUSED_TOKEN_"):
                added[token_id] = AddedToken(text, is_special=True)
    return added | dict(_added_tokens_of_config(config))


def _backend(
    folder: Path,
    *,
    encoder: tokenizers.Tokenizer,
    continuation: tokenizers.Tokenizer,
    text_prefix: str,
    added: Mapping[int, AddedToken],
    rules: DecodingRules,
    adds_bos: bool,
    named: dict[str, str],
) -> TokenizerBackend:
    literal = {token.text for token in added.values()}
    bos_token_id = encoder.token_to_id(named.get("bos_token", ""))
    eos_token_id = encoder.token_to_id(named.get("eos_token", ""))
    eos_token_ids = {*_configured_eos_ids(folder), *([] if eos_token_id is None else [eos_token_id])}
    return TokenizerBackend(
        encoder=encoder,
        continuation=continuation,
        text_prefix=text_prefix,
        control_tokens={token.text: token for token in added.values() if token.is_control},
        control_token_ids={token.text: token_id for token_id, token in added.items() if token.is_control},
        special_token_ids=frozenset(token_id for token_id, token in added.items() if token.is_special),
        token_bytes=token_byte_table(encoder.get_vocab(with_added_tokens=True), literal, rules),
        rules=rules,
        bos_token_id=bos_token_id,
        adds_bos=adds_bos and bos_token_id is not None,
        eos_token_ids=frozenset(eos_token_ids),
        named_tokens=named,
    )


def _added_tokens_of_config(config: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    for token_id, record in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        yield int(token_id), _added_token(record)


def _added_token(record: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        text=record["content"],
        is_special=bool(record.get("special")),
        swallows_left=bool(record.get("lstrip")),
        swallows_right=bool(record.get("rstrip")),
    )


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token, eos_token and so on; files write them as a string or as a record with the text in `content`."""
    named = {}
    for key in _NAMED_TOKENS:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            named[key] = text
    return named


def _configured_eos_ids(folder: Path) -> Iterator[int]:
    for name in ("config.json", "generation_config.json"):
        value = read_json_object(folder / name).get("eos_token_id")
        yield from value if isinstance(value, list) else [value] if isinstance(value, int) else []
