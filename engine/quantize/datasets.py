"""The data sets that are known by name: where a local copy lies, and how its documents become one text.

Nothing is downloaded. Files are looked for in the folder that the user names, as they are or in the hub cache's layout,
and then in the hub cache itself. How windows are drawn from the text is `text.py`'s business.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..api import ConfigError
from .text_files import is_text_file, read_documents

Split = Literal["calibration", "evaluation"]
Drawing = Literal["stream", "long documents", "short documents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One data set: the names of its repository on the hub, of its files, and what is made of their rows.

    `files` maps each split to the words that one of its file names begins with; `folder` is the part of the
    repository that is meant, where it has several. A stream's documents are joined with `separator`.
    """

    hub_names: tuple[str, ...]
    files: dict[Split, tuple[str, ...]]
    drawing: Drawing = "stream"
    folder: str = ""
    field: str = "text"
    separator: str = "\n\n"
    most_evaluated_documents: int | None = None


# Drawing and joining follow the loaders that AWQ, GPTQ and LMDeploy calibrate with (LMDeploy's calib_dataloader), and
# for evaluation those of GPTQ: wikitext2's test split, ptb's validation split, ptb_new's test split and the first
# 1100 validation documents of c4.
DATA_SETS: dict[str, DataSet] = {
    "wikitext2": DataSet(
        hub_names=("Salesforce/wikitext", "wikitext"),
        folder="wikitext-2-raw-v1",
        files={"calibration": ("train", "wiki.train"), "evaluation": ("test", "wiki.test")},
    ),
    "c4": DataSet(
        hub_names=("allenai/c4",),
        folder="en",
        files={"calibration": ("c4-train.00000", "train"), "evaluation": ("c4-validation.00000", "validation")},
        drawing="long documents",
        separator=" ",
        most_evaluated_documents=1100,
    ),
    "ptb": DataSet(
        hub_names=("ptb-text-only/ptb_text_only", "ptb_text_only"),
        files={"calibration": ("train", "ptb.train"), "evaluation": ("validation", "valid", "ptb.valid")},
        field="sentence",
    ),
    "ptb_new": DataSet(
        hub_names=("ptb-text-only/ptb_text_only", "ptb_text_only"),
        files={"calibration": ("train", "ptb.train"), "evaluation": ("test", "ptb.test")},
        field="sentence",
        separator=" ",
    ),
    "pileval": DataSet(
        hub_names=("mit-han-lab/pile-val-backup",),
        files={"calibration": ("val",)},
        drawing="short documents",
    ),
}


def read_data_set(name: str, split: Split, data_dir: Path | None) -> list[str]:
    """Return the documents of a split, in the order of the files; ConfigError when there is no local copy."""
    data_set = DATA_SETS[name]
    prefixes = data_set.files.get(split)
    if prefixes is None:
        raise ConfigError(f"{name} has no part to evaluate on beside the one to calibrate with; take another text")
    looked_in = list(_folders(name, data_set, data_dir))
    for folder in looked_in:
        files = _files(folder, prefixes, is_all_of_it=folder != data_dir)
        if files:
            return [text for path in files for text in _texts(path, data_set)]
    wanted = " or ".join(f"{prefix}*" for prefix in prefixes)
    places = ", ".join(map(str, looked_in)) or f"{_hub_cache()}, which has none of {', '.join(data_set.hub_names)}"
    raise ConfigError(
        f"there is no local copy of {name} with a file {wanted} (.parquet, .jsonl, .txt, .gz); looked in {places}. "
        "Nothing is downloaded, and .zst is not unpacked: put a copy into a folder and name that, or take a text file"
    )


def _folders(name: str, data_set: DataSet, data_dir: Path | None) -> Iterator[Path]:
    """Yield the folders that may hold a copy, the surest first."""
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"{data_dir} is no folder; give the one that holds the files of {name}")
    hubs = [] if data_dir is None else [data_dir, data_dir / "hub"]
    for hub in [*hubs, _hub_cache()]:
        for hub_name in data_set.hub_names:
            repository = hub / f"datasets--{hub_name.replace('/', '--')}"
            snapshots = sorted((repository / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
            yield from (snapshot / data_set.folder for snapshot in reversed(snapshots))
        if hub == data_dir:
            yield from (_inner(folder, data_set) for folder in (data_dir / name, data_dir) if folder.is_dir())


def _files(folder: Path, prefixes: tuple[str, ...], *, is_all_of_it: bool) -> list[Path]:
    """Return a split's files; in a folder that other data sets may share, only those that lie there directly."""
    for prefix in prefixes:
        found = folder.rglob(f"{prefix}*") if is_all_of_it else folder.glob(f"{prefix}*")
        files = sorted(path for path in found if path.is_file() and is_text_file(path))
        if files:
            return files
    return []


def _inner(folder: Path, data_set: DataSet) -> Path:
    """Return the part of a copy that is meant, where that has a folder of its own as on the hub."""
    inner = folder / data_set.folder
    return inner if inner.is_dir() else folder


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(os.environ.get("HF_HUB_CACHE", HF_HUB_CACHE))


def _texts(path: Path, data_set: DataSet) -> Iterator[str]:
    """Yield the rows of a file; a plain text has one a line, as the published rows were made from such files."""
    for document in read_documents(path, (data_set.field, "text")):
        if not isinstance(document, str):
            raise ConfigError(f"{path} has a chat where {data_set.field!r} belongs; give it as a chat file instead")
        is_rows = path.name.removesuffix(".gz").endswith((".parquet", ".jsonl", ".json"))
        yield from (document,) if is_rows else _lines(document, data_set)


def _lines(text: str, data_set: DataSet) -> Iterator[str]:
    """Split a plain text as the data set's own loader does: wikitext keeps line ends and blank lines, ptb neither."""
    for line in io.StringIO(text):
        if data_set.field == "sentence":
            yield line.strip()
        else:
            yield line if line.strip() else ""
