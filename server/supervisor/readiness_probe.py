"""Asks the server's own port whether it is ready, as a client would."""

from __future__ import annotations

import asyncio
import socket
import ssl

REQUEST = b"GET /v1/health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
ANSWER_TIME_S = 5.0


async def is_ready(listener: socket.socket, is_tls: bool) -> bool:
    """Whether GET /v1/health/ready on this socket's address answers 200."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        # Our own server: any certificate is fine.
        tls = ssl._create_unverified_context() if is_tls else None
        reader, writer = await asyncio.open_connection(host, port, ssl=tls)
        writer.write(REQUEST)
        status_line = await asyncio.wait_for(reader.readline(), ANSWER_TIME_S)
        writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.startswith(b"HTTP/1.1 200")
