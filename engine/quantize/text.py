"""Text to calibrate with and to evaluate on, as windows of token ids.

Owns how windows are drawn. Sources are the text in the package, data sets known by name (`datasets.py`), and local
files (`text_files.py`). The engine knows no tokenizer: whoever calls brings functions that encode.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..api import ConfigError
from .datasets import DATA_SETS, Split, read_data_set
from .text_files import Document, Message, is_text_file, read_documents

BUILTIN = "builtin"
_BUILTIN_FOLDER = Path(__file__).parent / "texts"

# Documents of pileval that are longer are skipped, as AWQ's own calibration does.
_MOST_TOKENS_OF_SHORT_DOCUMENTS = 512

Encode = Callable[[str], list[int]]
EncodeChat = Callable[[list[Message]], list[int]]


class TokenSource(ABC):
    """A text as tokens, and how calibration windows are drawn from it."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def draw(self, num_samples: int, seqlen: int, draws: random.Random) -> list[Sequence[int]]:
        """Return `num_samples` windows of `seqlen` tokens; ConfigError when the text is too short."""

    @abstractmethod
    def stream(self) -> Sequence[int]:
        """Return all tokens in order."""


class TokenStream(TokenSource):
    """One long run of tokens; windows begin anywhere in it, and may overlap."""

    def __init__(self, name: str, token_ids: Sequence[int]) -> None:
        super().__init__(name)
        self._token_ids = token_ids

    def draw(self, num_samples: int, seqlen: int, draws: random.Random) -> list[Sequence[int]]:
        """See TokenSource; the same windows as LMDeploy's `get_wikitext2` for the same seed."""
        last_start = len(self._token_ids) - seqlen
        if last_start < 0:
            raise ConfigError(
                f"the text {self.name} has {len(self._token_ids)} tokens and a window has {seqlen}; give more text, or "
                "set --calib-seqlen lower"
            )
        starts = [draws.randint(0, last_start) for _ in range(num_samples)]
        return [self._token_ids[start : start + seqlen] for start in starts]

    def stream(self) -> Sequence[int]:
        """See TokenSource."""
        return self._token_ids


class _Documents(TokenSource):
    """Documents that are encoded when they are needed."""

    def __init__(self, name: str, texts: Sequence[str], encode: Encode) -> None:
        super().__init__(name)
        self._texts = texts
        self._encode = encode

    def stream(self) -> Sequence[int]:
        """See TokenSource."""
        return [token_id for text in self._texts for token_id in self._encode(text)]


class LongDocuments(_Documents):
    """Each window lies in a document of its own, drawn until one is long enough: c4."""

    def draw(self, num_samples: int, seqlen: int, draws: random.Random) -> list[Sequence[int]]:
        """See TokenSource; the same windows as LMDeploy's `get_c4` for the same seed."""
        too_short: set[int] = set()
        return [self._draw_one(seqlen, draws, too_short) for _ in range(num_samples)]

    def _draw_one(self, seqlen: int, draws: random.Random, too_short: set[int]) -> Sequence[int]:
        while len(too_short) < len(self._texts):
            index = draws.randint(0, len(self._texts) - 1)
            if index in too_short:
                continue
            token_ids = self._encode(self._texts[index])
            if len(token_ids) >= seqlen:
                start = draws.randint(0, len(token_ids) - seqlen)
                return token_ids[start : start + seqlen]
            too_short.add(index)
        raise ConfigError(
            f"none of the {len(self._texts)} documents of {self.name} has {seqlen} tokens; set --calib-seqlen lower"
        )


class ShortDocuments(_Documents):
    """Windows are cut from a row of short documents in random order: pileval."""

    def draw(self, num_samples: int, seqlen: int, draws: random.Random) -> list[Sequence[int]]:
        """See TokenSource. AWQ and LMDeploy take `num_samples` documents; here as many as the windows need."""
        order = list(range(len(self._texts)))
        draws.shuffle(order)
        needed = num_samples * seqlen
        token_ids: list[int] = []
        for index in order:
            document = self._encode(self._texts[index].strip())
            if len(document) <= _MOST_TOKENS_OF_SHORT_DOCUMENTS:
                token_ids += document
            if len(token_ids) >= needed:
                return [token_ids[start : start + seqlen] for start in range(0, needed, seqlen)]
        raise ConfigError(
            f"the short documents of {self.name} have {len(token_ids)} tokens and {num_samples} windows of {seqlen} "
            f"need {needed}; set --calib-samples or --calib-seqlen lower"
        )


def read_text(
    source: str, *, data_dir: Path | None, split: Split, encode: Encode, encode_chat: EncodeChat | None
) -> TokenSource:
    """Return a text: `builtin`, a data set's name, or the path of a file or of a folder of files.

    `encode` gives a document's ids with what the model's tokenizer puts first (BOS, for most), `encode_chat` those of
    a conversation through the model's template; None where the model has no template. A file has no splits: it is the
    same text for both. ConfigError says what is wrong with a source and what to give instead.
    """
    if source == BUILTIN:
        documents = read_documents(_BUILTIN_FOLDER / f"{split}.jsonl")
        if encode_chat is None:  # a base model has no use for the chats
            documents = [document for document in documents if isinstance(document, str)]
        return TokenStream(source, _encode_documents(documents, encode, encode_chat, source, is_joined=False))
    if source in DATA_SETS:
        return _data_set_source(source, split, data_dir, encode)
    documents = [document for path in _local_files(source) for document in read_documents(path)]
    return TokenStream(source, _encode_documents(documents, encode, encode_chat, source, is_joined=True))


def held_out_text(source: str) -> str:
    """Return the text to measure on when a model was calibrated on `source`: its own other part, else the built-in."""
    has_other_part = source in DATA_SETS and "evaluation" in DATA_SETS[source].files
    return source if has_other_part else BUILTIN


def calibration_windows(source: TokenSource, *, num_samples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Return int64 [num_samples, seqlen], the same for the same seed; ConfigError when there is too little text."""
    return torch.tensor(source.draw(num_samples, seqlen, random.Random(seed)), dtype=torch.int64)


def evaluation_windows(source: TokenSource, *, seqlen: int, max_tokens: int | None) -> torch.Tensor:
    """Return int64 [num_windows, seqlen]: the text from its beginning, cut without overlap, the rest left out.

    At most `max_tokens` tokens are taken; None takes all. ConfigError when not one window is full.
    """
    token_ids = source.stream()
    num_tokens = len(token_ids) if max_tokens is None else min(max_tokens, len(token_ids))
    num_windows = num_tokens // seqlen
    if num_windows == 0:
        raise ConfigError(
            f"the text {source.name} has {num_tokens} tokens to evaluate and a window has {seqlen}; give more text, or "
            "a shorter window"
        )
    return torch.tensor(token_ids[: num_windows * seqlen], dtype=torch.int64).view(num_windows, seqlen)


def _data_set_source(name: str, split: Split, data_dir: Path | None, encode: Encode) -> TokenSource:
    data_set, texts = DATA_SETS[name], read_data_set(name, split, data_dir)
    if split == "calibration" and data_set.drawing == "long documents":
        return LongDocuments(name, texts, encode)
    if split == "calibration" and data_set.drawing == "short documents":
        return ShortDocuments(name, texts, encode)
    return TokenStream(name, encode(data_set.separator.join(texts[: data_set.most_evaluated_documents])))


def _local_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and is_text_file(entry))
        if files:
            return files
        raise ConfigError(f"the folder {source} has no text files (.txt, .jsonl, .json, .parquet, also with .gz)")
    raise ConfigError(
        f"the text {source!r} is neither a file nor a data set known by name; known are {', '.join(DATA_SETS)} (from a "
        f"local copy) and {BUILTIN}"
    )


def _encode_documents(
    documents: Iterable[Document],
    encode: Encode,
    encode_chat: EncodeChat | None,
    name: str,
    *,
    is_joined: bool,
) -> list[int]:
    """Return the ids of all documents; texts in a row are one text, a blank line between them, when `is_joined`."""
    token_ids: list[int] = []
    texts: list[str] = []
    for document in documents:
        if isinstance(document, str):
            texts.append(document)
            continue
        if encode_chat is None:
            raise ConfigError(f"{name} holds chats, and this model has no chat template to render them with")
        token_ids += _encode_texts(texts, encode, is_joined=is_joined)
        token_ids += encode_chat(document)
        texts = []
    return token_ids + _encode_texts(texts, encode, is_joined=is_joined)


def _encode_texts(texts: Sequence[str], encode: Encode, *, is_joined: bool) -> list[int]:
    if is_joined:
        return encode("\n\n".join(texts)) if texts else []
    return [token_id for text in texts for token_id in encode(text)]
