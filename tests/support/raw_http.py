"""HTTP as bytes: sends what no HTTP library would, and finds the answers in what comes back.

Knows nothing of the server but its port.
"""

from __future__ import annotations

import socket
import ssl
import time

from support.invariants import Answer

TIMEOUT_S = 120.0


def exchange(
    port: int, *pieces: bytes, pause_s: float = 0.0, tls: ssl.SSLContext | None = None
) -> bytes:
    """Send the pieces as they are; gives all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is None:
            return _exchange(plain, pieces, pause_s)
        with tls.wrap_socket(plain, server_hostname="localhost") as secure:
            return _exchange(secure, pieces, pause_s)


def _exchange(connection: socket.socket, pieces: tuple[bytes, ...], pause_s: float) -> bytes:
    for piece in pieces:
        try:
            connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            # The answer has come already, and with it the end.
            break
        time.sleep(pause_s)
    return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    while piece := connection.recv(65_536):
        received += piece
    return received


def answers_in(received: bytes) -> list[Answer]:
    """Every answer in a connection's bytes; fails where something is left over."""
    answers = []
    while received:
        head, separator, rest = received.partition(b"\r\n\r\n")
        assert separator, received[:200]
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        length = int(headers.get("content-length", 0))
        answers.append(Answer(int(status), headers, rest[:length]))
        received = rest[length:]
    return answers


def only_answer(received: bytes) -> Answer:
    """The one answer there is, which says that the connection closes."""
    (answer,) = answers_in(received)
    assert answer.headers["connection"] == "close"
    return answer
