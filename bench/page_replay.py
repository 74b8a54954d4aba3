"""Records what a server sends to the page at /, and sends the same again at the same pace.

    python bench/page_replay.py FILE

A server that makes tokens takes the processor from the browser beside it: frames of a replayed
stream are the page's own. Prints its port, and runs until its standard input ends. Knows nothing
of what the page does with it.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vlmserve.server.http.page_files import UI_PATHS

GET_PATHS = (*UI_PATHS, "/v1/models", "/v1/playground", "/openapi.json")
CHAT = "/v1/chat/completions"
KEPT_HEADERS = ("content-type", "content-security-policy")
TIMEOUT_S = 300


class Reply(msgspec.Struct):
    """An answer's headers, and its parts with the seconds at which each came."""

    headers: dict[str, str]
    parts: list[tuple[float, bytes]]


def record(port: int, body: dict[str, Any]) -> dict[str, Reply]:
    """The files and answers that the page asks for, by path, and one streamed answer to `body`."""
    replies = {path: _ask(port, "GET", path) for path in GET_PATHS}
    replies[CHAT] = _ask(port, "POST", CHAT, json.dumps(body))
    return replies


def _ask(port: int, method: str, path: str, body: str | None = None) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        headers = {"Accept": "text/html, */*", "Content-Type": "application/json"}
        started = time.perf_counter()
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise RuntimeError(f"{path}: {answer.read()[:500]!r}")
        parts = []
        while part := answer.read1():
            parts.append((time.perf_counter() - started, part))
        kept = {name: answer.headers[name] for name in KEPT_HEADERS if name in answer.headers}
        return Reply(kept, parts)


@contextlib.contextmanager
def replaying(replies: dict[str, Reply], folder: Path) -> Iterator[int]:
    """The port of a process that sends the replies; it ends with the block."""
    file = folder / "replies"
    file.write_bytes(msgspec.msgpack.encode(replies))
    command = [sys.executable, __file__, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    replies: dict[str, Reply]

    def do_GET(self) -> None:
        reply = self.replies.get(self.path)
        if reply is None:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        started = time.perf_counter()
        for second, part in reply.parts:
            time.sleep(max(0.0, started + second - time.perf_counter()))
            self.wfile.write(part)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


def main() -> None:
    data = Path(sys.argv[1]).read_bytes()
    _Handler.replies = msgspec.msgpack.decode(data, type=dict[str, Reply])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
