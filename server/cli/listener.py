"""Opens the TCP socket that clients connect to."""

from __future__ import annotations

import errno
import socket


class ListenError(Exception):
    """The socket cannot listen on the address; the message is one line for the operator."""


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening TCP socket on host:port (port 0 picks a free one).

    option: what sets the port, for the error. Raises ListenError.
    """
    if not host:
        # For the system an empty name is every address: `--host "$HOST"` in a shell without HOST.
        raise ListenError("--host is empty: give an address, such as 127.0.0.1, or 0.0.0.0 for all")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        is_place_wrong = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        remedy = (
            "--host must be an address of this machine"
            if is_place_wrong
            else f"choose another {option}"
        )
        raise ListenError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; {remedy}"
        ) from error
    return listener
