"""Where a model's folder is: `demo`, a local path, or a hub name that is downloaded or found in the hub's cache.

No torch here, so that a plan can be made without it. What the folder holds is `model_config`'s and `checkpoint`'s
business.
"""

import fnmatch
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .api import ConfigError

_DEMO_NAME = "demo"
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_HUB_TIMEOUT_S = 10.0  # for the first answer; a machine without network learns at once, its cache then serves
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")  # the first kind that a model has
_IGNORED_PATTERN = "consolidated*"  # the same weights once more, in the layout of Mistral's own tools
_METADATA_PATTERNS = ["*.json", "*.model", "*.jinja", "*.txt"]


def resolve_model_folder(model: str, revision: str | None) -> Path:
    """Return the folder of `demo`, of a local path, or of a hub name: brought up to date, or as cached when offline.

    Raises ConfigError when it is none of these, or when `revision` is given for something without revisions.
    """
    return _resolve(model, revision, _WEIGHT_PATTERNS)


def resolve_config_folder(model: str, revision: str | None) -> Path:
    """Return the same folder for reading config.json; of a hub name no weights are downloaded for it."""
    return _resolve(model, revision, ())


def _resolve(model: str, revision: str | None, weight_patterns: Sequence[str]) -> Path:
    folder = _demo_folder() if model == _DEMO_NAME else Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"--revision {revision} is for hub names, and {model} is a local folder; leave it out")
        return folder
    if model == _DEMO_NAME:
        raise ConfigError(
            f"the demo model is not in this installation ({folder} is missing); install the package again"
        )
    if folder.exists():
        raise ConfigError(f"{model} is a file; --model needs the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(model):
        raise ConfigError(f"{model} is no local folder and no hub name such as internlm/internlm2_5-1_8b-chat")
    return _download(model, revision, weight_patterns)


def _demo_folder() -> Path:
    return Path(__file__).parent.parent / "demo" / "model"


def _download(name: str, revision: str | None, weight_patterns: Sequence[str]) -> Path:
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        # Not `list_repo_files`, which tries for 30 s to reach a hub that is not there.
        siblings = model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S).siblings or []
        files = [file.rfilename for file in siblings if not fnmatch.fnmatch(file.rfilename, _IGNORED_PATTERN)]
        weights = [pattern for pattern in weight_patterns if fnmatch.filter(files, pattern)][:1]
        wanted = [*_METADATA_PATTERNS, *weights]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_IGNORED_PATTERN))
    except GatedRepoError:
        reason = "its owner wants you to accept terms on its page; then set HF_TOKEN to your access token"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision}; check --revision"
    except RepositoryNotFoundError:
        reason = "the hub has no such model; check the name, or set HF_TOKEN for a private one"
    except Exception as error:  # any failure of the network or the disk ends the same way for the user
        with suppress(Exception):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        reason = f"the download failed ({_first_line(error)}); check the network, or give a local folder"
    raise ConfigError(f"{name} is no local folder, and it cannot be had from the hub: {reason}")


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
