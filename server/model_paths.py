"""The paths that an order may name: all of them lie in `--models-dir`, whatever links and dots are in them."""

from pathlib import Path

from .errors import BadRequestError

_DEMO = "demo"


class ModelPaths:
    """The folder that orders are confined to. Paths in orders are relative to it, or absolute and inside it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def checkpoint(self, text: str, param: str, *, demo_folder: Path) -> Path:
        """Return the folder of a checkpoint; `demo` is the model in the package. BadRequestError if there is none."""
        if text == _DEMO and not (self.root / _DEMO).exists():
            return demo_folder
        folder = self.existing(text, param)
        if not (folder / "config.json").is_file():
            raise BadRequestError(f"{param}: {text!r} holds no config.json, so it is no checkpoint", param=param)
        return folder

    def existing(self, text: str, param: str) -> Path:
        """Return a file or folder that is there."""
        path = self._inside(text, param)
        if not path.exists():
            raise BadRequestError(f"{param}: there is no {text!r} in {self.root}", param=param)
        return path

    def new_folder(self, text: str, param: str) -> Path:
        """Return a folder that may be made: it is not there, or empty, and what it is to lie in exists."""
        path = self._inside(text, param)
        if path == self.root or not path.parent.is_dir():
            raise BadRequestError(
                f"{param}: {text!r} must be a new folder in {self.root}, or in a folder that is there", param=param
            )
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise BadRequestError(
                f"{param}: {text!r} is there already; choose another name, or remove it first", param=param
            )
        return path

    def name_of(self, path: Path) -> str:
        """Return what a path inside is called in replies."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else path.name

    def _inside(self, text: str, param: str) -> Path:
        try:
            path = (self.root / text).resolve()
            path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, links in a circle
            raise BadRequestError(f"{param}: {text[:80]!r} is no path ({error})", param=param) from None
        if not path.is_relative_to(self.root):
            raise BadRequestError(f"{param}: {text!r} lies outside {self.root} (--models-dir)", param=param)
        if any(part.startswith(".") for part in path.relative_to(self.root).parts):
            raise BadRequestError(f"{param}: {text!r} is hidden; hidden folders are the server's own", param=param)
        return path
