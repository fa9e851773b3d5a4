"""Checkpoints to engines and their text sides: the first one at start, others beside it or in its place.

With `cli.py` and `pipeline.py` the only place that builds engines. Everything here blocks; the event loop calls it on
a thread. Torch is imported where it is needed.
"""

import dataclasses
import importlib
import os
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lmdserve.engine.api import Engine, EngineInfo, SwapPlan
from lmdserve.engine.config import EngineConfig
from lmdserve.engine.torch_setup import begin_cuda_context, prepare_torch

from .config import ServerConfig
from .model_folder import tokenizer_file
from .templates import read_template

if TYPE_CHECKING:
    from .model import ServedModel


class EngineLoader:
    """The Loader of `swap.py`: loads with the options of the command line; only the checkpoint changes."""

    def __init__(self, engine_config: EngineConfig, server_config: ServerConfig) -> None:
        self._engine_config = engine_config
        self._server_config = server_config
        self._name = server_config.model_name or _last_part(engine_config.model)

    @property
    def demo_folder(self) -> Path:
        """See Loader."""
        from lmdserve.engine.model_folder import resolve_model_folder

        return resolve_model_folder("demo", None)

    def load_first(self) -> "tuple[Engine, ServedModel]":
        """Load `--model`; everything that can be wrong with it is a ConfigError.

        The text side and the modules of the HTTP side, which do without torch, are loaded on a thread beside the
        weights.
        """
        prepare_torch()
        config = self._engine_config
        if config.device != "cpu":
            begin_cuda_context()
        from lmdserve.engine.model_folder import resolve_model_folder

        folder = resolve_model_folder(config.model, config.revision)
        self._check_text_files(folder)
        with ThreadPoolExecutor(1) as beside:
            model = beside.submit(self._load_text_side, folder, _last_part(config.model))
            from lmdserve.engine.load_engine import load_engine

            engine = load_engine(dataclasses.replace(config, model=str(folder)))
            return engine, model.result()

    def plan(self, folder: Path, running: EngineInfo, *, may_load_beside: bool) -> SwapPlan:
        """See Loader."""
        from lmdserve.engine.beside import plan_swap

        return plan_swap(self._config_for(folder), running, may_load_beside=may_load_beside)

    def load(self, folder: Path, *, checkpoint: str) -> "tuple[Engine, ServedModel]":
        """See Loader. When it fails, what it had taken is given back."""
        from lmdserve.engine.beside import memory_left
        from lmdserve.engine.load_engine import load_engine
        from lmdserve.engine.memory_guard import return_freed_memory

        config = self._config_for(folder)
        model = self._load_text_side(folder, checkpoint)
        try:
            return load_engine(config, memory=memory_left(config)), model
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold what was loaded so far
            return_freed_memory()
            raise

    def spare_gpu_bytes(self, running: EngineInfo) -> int | None:
        """See Loader."""
        from lmdserve.engine.beside import spare_gpu_bytes

        return spare_gpu_bytes(self._engine_config, running)

    def quantizing_gpu_bytes(self, folder: Path, *, has_evaluation: bool) -> int:
        """See Loader."""
        from lmdserve.engine.model_config import ModelConfig
        from lmdserve.engine.quantize.memory import needed_gpu_bytes

        return needed_gpu_bytes(ModelConfig.from_folder(folder), has_evaluation=has_evaluation)

    def _config_for(self, folder: Path) -> EngineConfig:
        return dataclasses.replace(self._engine_config, model=str(folder), revision=None, model_format="auto")

    def _check_text_files(self, folder: Path) -> None:
        """Find what is missing before the weights are read, which may take minutes."""
        if self._server_config.chat_template is not None:
            read_template(Path(self._server_config.chat_template))
        if (folder / "config.json").is_file():  # without one it is no checkpoint, which the engine says
            tokenizer_file(folder)

    def _load_text_side(self, folder: Path, checkpoint: str) -> "ServedModel":
        from .model import load_served_model

        chat_template = self._server_config.chat_template
        served = load_served_model(folder, name=self._name, chat_template=chat_template, checkpoint=checkpoint)
        importlib.import_module("lmdserve.server.app")
        return served


def _last_part(model: str) -> str:
    """Return the last part of a path or hub name, of `.` and `..` the folder's own name."""
    return os.path.basename(os.path.abspath(os.path.expanduser(model)))
