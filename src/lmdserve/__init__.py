"""lmdserve serves InternLM2-family chat models over the OpenAI API; `pipeline` runs one inside your own program."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdserve.server.pipeline import GenerationConfig, Pipeline, Response, pipeline

__version__ = "0.1.0"
__all__ = ["GenerationConfig", "Pipeline", "Response", "__version__", "pipeline"]


def __getattr__(name: str) -> object:
    """Import the public API on first use, so that `lmdserve --help` never waits for torch."""
    if name in __all__:
        from lmdserve.server import pipeline as module

        return getattr(module, name)
    raise AttributeError(f"module 'lmdserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Show the public API to completion before it was used."""
    return __all__
