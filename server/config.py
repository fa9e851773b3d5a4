"""The server's options, each with its name, default and help in one place. No torch and no aiohttp here."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmdserve.engine.api import ConfigError
from lmdserve.engine.config import check_bounds, option

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)

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
    models_dir: str | None = option(None, "folder of checkpoints that /admin may quantize, write and serve")
    admin_keys: tuple[str, ...] = option(
        (), "one or more keys that open /admin, which is closed without; also LMDSERVE_ADMIN_KEYS, by commas"
    )
    admin: bool = option(False, "open /admin without a key to programs on this machine")
    allow_origins: tuple[str, ...] = option((), "origins that browsers may call from (CORS); `*` for any")

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.server_name:
            raise ConfigError("--server-name is empty, which would mean every address; 0.0.0.0 says so")
        for name, keys in (("--api-keys", self.api_keys), ("--admin-keys", self.admin_keys)):
            if any(not key or key.split() != [key] for key in keys):
                raise ConfigError(f"{name} has a key that is empty or has a space in it; clients cannot send that")
        for origin in self.allow_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allow-origins {origin}: an origin is a scheme and a host, such as https://example.com or "
                    "http://localhost:3000, with nothing behind"
                )

    @property
    def is_admin_open(self) -> bool:
        """Whether anybody may give orders."""
        return self.admin or bool(self.admin_keys)


def check_admin(config: ServerConfig) -> None:
    """Raise ConfigError unless the options about /admin make sense together."""
    if not config.is_admin_open:
        return
    if config.models_dir is None:
        raise ConfigError("--admin and --admin-keys need --models-dir, the folder that orders are confined to")
    if not Path(config.models_dir).is_dir():
        raise ConfigError(f"--models-dir {config.models_dir} is no folder; make it, or name another")
    if config.admin and not config.admin_keys and not is_loopback(config.server_name):
        raise ConfigError(
            f"--admin opens /admin to whoever can connect, so it needs an address of this machine alone, and "
            f"--server-name is {config.server_name}; give --admin-keys instead"
        )
    if set(config.admin_keys) & set(config.api_keys):
        raise ConfigError("a key is in --api-keys and in --admin-keys; clients must not be able to give orders")


def is_loopback(host: str) -> bool:
    """Say whether an address or name is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
