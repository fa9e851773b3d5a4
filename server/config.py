"""The server's options, each with its name, default and help in one place. No torch and no aiohttp here."""

from dataclasses import dataclass
from typing import Literal

from lmdserve.engine.config import check_bounds, option

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the HTTP side needs beside an engine; `server/options.py` turns the fields into arguments."""

    model_name: str | None = option(None, "name that clients use; default: the last part of --model")
    server_name: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network (then set --api-keys)"
    )
    server_port: int = option(23333, "port to listen on; 0 picks a free one and prints it", at_least=0, at_most=65535)
    api_keys: tuple[str, ...] = option((), "one or more keys that clients must send; also LMDSERVE_API_KEYS, by commas")
    chat_template: str | None = option(None, "file with a Jinja chat template to use instead of the model's")
    log_level: LogLevel = option("INFO", "least severe message that is logged")
    shutdown_timeout: float = option(
        30.0, "seconds that running requests get to finish on SIGTERM or Ctrl-C", at_least=0
    )
    keep_alive_interval: float = option(
        15.0, "seconds of silence after which a stream gets an SSE comment", at_least=0.1
    )
    allow_origins: tuple[str, ...] = option((), "origins that browsers may call from (CORS); `*` for any")

    def __post_init__(self) -> None:
        check_bounds(self)
