"""Where the server listens: whether it can, found out before a model is loaded, and the one sentence when it cannot.

Standard library only, so that the command line can ask early. Listening itself is `app.py`'s.
"""

import socket

from lmdserve.engine.api import ConfigError


def check_address(name: str, port: int) -> None:
    """Raise ConfigError if nothing can listen on this address now; port 0, which picks a free one, always can."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a past server may linger
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise cannot_listen(name, port, error) from error


def cannot_listen(name: str, port: int, error: OSError) -> ConfigError:
    """Return the error for an address that cannot be listened on."""
    return ConfigError(
        f"cannot listen on {name} port {port} ({error.strerror or error}); "
        "choose another with --server-name and --server-port (0 picks a free port)"
    )
