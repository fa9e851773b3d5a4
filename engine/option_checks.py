"""What the bounds of single options cannot tell: whether the options suit each other and the checkpoint. No torch."""

import math

from .api import ConfigError
from .config import EngineConfig
from .model_config import ModelConfig


def check_options(config: EngineConfig, model_config: ModelConfig) -> None:
    """Raise ConfigError, saying what to give instead, for the first option that cannot be honoured."""
    _check_tp(config)
    _check_cache_count(config)
    _check_model_format(config, model_config)
    _check_session_len(config, model_config)


def format_name(model_config: ModelConfig) -> str:
    """Return the checkpoint's weight format as `--model-format` names it."""
    return "hf" if model_config.quantization is None else model_config.quantization.method


def _check_tp(config: EngineConfig) -> None:
    if config.tp != 1:
        raise ConfigError(f"--tp {config.tp} is not supported: a model runs on one GPU so far; use --tp 1")


def _check_cache_count(config: EngineConfig) -> None:
    count = config.cache_max_entry_count
    if not math.isfinite(count) or (count >= 1 and count != int(count)):
        raise ConfigError(
            f"--cache-max-entry-count is {count:g}; give a share of free memory between 0 and 1, such as 0.8, "
            "or a whole number of KV blocks"
        )


def _check_model_format(config: EngineConfig, model_config: ModelConfig) -> None:
    found = format_name(model_config)
    if config.model_format not in ("auto", found):
        raise ConfigError(
            f"--model-format is {config.model_format} and the checkpoint's format is {found}; "
            f"leave the option out or give {found}"
        )


def _check_session_len(config: EngineConfig, model_config: ModelConfig) -> None:
    limit = model_config.max_position_embeddings
    if config.session_len is not None and config.session_len > limit and model_config.rope.kind != "dynamic":
        raise ConfigError(
            f"--session-len {config.session_len} is longer than the model's context, {limit} tokens, "
            f"and the model's RoPE does not stretch; give at most {limit}"
        )
