"""HTTP/2 in front: nginx and haproxy with the shipped configurations, HTTP/1.1 to the server.

Needs nginx, haproxy, curl and openssl (Debian: nginx-light, haproxy, curl, openssl).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support.invariants import CHAT, Standing, body_for
from support.polling import wait_until
from support.running import FaultyServer, free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "proxy"
PATH = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/bin"
MAX_BODY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What curl received. headers: with lower-case names."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy in front of a server."""

    port: int
    server: FaultyServer

    def command(self, path: str, *options: str) -> list[str]:
        url = f"https://127.0.0.1:{self.port}{path}"
        return ["curl", "--http2", "-ksN", "--max-time", "120", url, *options]

    def ask(self, path: str, *options: str, data: bytes | None = None) -> Answer:
        """One request over HTTP/2, its body from `data`."""
        sent = [] if data is None else ["-H", "Content-Type: application/json", "--data-binary"]
        sent += [] if data is None else ["@-"]
        done = subprocess.run(
            self.command(path, "-i", "-H", "Expect:", *sent, *options),
            input=data, capture_output=True, timeout=150,
        )  # fmt: skip
        assert done.returncode == 0, done
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        version, status = first.split()[:2]
        return Answer(version, int(status), {k.lower(): v for k, _, v in pairs}, body)


def certificate(folder: Path) -> None:
    """api.pem, api.key and both in one file, for 127.0.0.1."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-out", folder / "api.pem", "-keyout", folder / "api.key"),
        ],
        check=True,
        capture_output=True,
    )
    both = (folder / "api.pem").read_text() + (folder / "api.key").read_text()
    (folder / "api-with-key.pem").write_text(both)


def shipped(name: str, folder: Path, port: int, upstream: int) -> str:
    """A shipped configuration with this test's ports and files."""
    text = (DEPLOY / name).read_text().replace("/etc/ssl/", f"{folder}/")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
    return text.replace("listen 443", f"listen 127.0.0.1:{port}").replace(
        "*:443", f"127.0.0.1:{port}"
    )


def nginx_command(program: str, folder: Path, port: int, upstream: int) -> list[str]:
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in paths)
    # Its workers else leave root, and cannot write below pytest's folders.
    user = "user root root; " if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}"
        f"{shipped('nginx.conf', folder, port, upstream)}}}\n"
    )
    return [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]


def haproxy_command(program: str, folder: Path, port: int, upstream: int) -> list[str]:
    (folder / "haproxy.cfg").write_text(shipped("haproxy.cfg", folder, port, upstream))
    return [program, "-db", "-f", str(folder / "haproxy.cfg")]


COMMANDS = {"nginx": nginx_command, "haproxy": haproxy_command}


@pytest.fixture(scope="module")
def upstream(start_shared_faulty_server) -> FaultyServer:
    return start_shared_faulty_server(server={"max_body_bytes": MAX_BODY_BYTES})


@pytest.fixture(scope="module", params=COMMANDS)
def proxy(request, upstream, tmp_path_factory) -> Iterator[Proxy]:
    program = shutil.which(request.param, path=PATH)
    if program is None or not (shutil.which("curl") and shutil.which("openssl")):
        pytest.skip(f"{request.param}, curl or openssl is not installed")
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    certificate(folder)
    command = COMMANDS[request.param](program, folder, port, upstream.port)
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            running = Proxy(port, upstream)
            assert wait_until(lambda: is_up(running) or process.poll() is not None)
            assert process.poll() is None, (folder / "log").read_text()
            yield running
        finally:
            process.send_signal(signal.SIGTERM)


def is_up(proxy: Proxy) -> bool:
    with contextlib.suppress(AssertionError):
        return proxy.ask("/v1/health/ready").status == 200
    return False


def num_connections(server: FaultyServer) -> int:
    """Connections that the server's worker has open with its clients."""
    (worker,) = Standing(server).pids("worker")
    pairs = psutil.Process(worker).net_connections("tcp4")
    return sum(one.status == "ESTABLISHED" and one.laddr.port == server.port for one in pairs)


def test_row_72_answers_and_errors_pass_and_connections_are_used_again(proxy: Proxy) -> None:
    body = json.dumps(body_for(CHAT)).encode()
    before = num_connections(proxy.server)
    for number in range(10):
        answer = proxy.ask(CHAT, "-H", f"X-Request-Id: r{number}", data=body)
        assert (answer.version, answer.status) == ("HTTP/2", 200)
        assert answer.headers["x-request-id"] == f"r{number}"
    assert num_connections(proxy.server) <= before + 2
    assert proxy.ask(CHAT, data=b"{").status == 400
    assert proxy.ask("/metrics").status == 403
    too_large = proxy.ask(CHAT, data=b" " * (MAX_BODY_BYTES + 1))
    assert (too_large.status, json.loads(too_large.body)["code"]) == (413, 413)
    long_head = proxy.ask("/v1/models", "-H", f"X-Long: {'x' * 20_000}")
    assert (long_head.status, json.loads(long_head.body)["code"]) == (431, 431)


@pytest.mark.slow
def test_row_72_a_stream_comes_token_by_token_and_a_cancel_reaches_the_engine(
    proxy: Proxy, wait_for
) -> None:
    standing = Standing(proxy.server, is_warm=True)
    body = body_for(CHAT, max_tokens=3000, ignore_eos=True, stream=True)
    proxy.server.suffer("slow 0.05")
    with standing.holds():
        sent = ("-H", "Content-Type: application/json", "-d", json.dumps(body))
        with subprocess.Popen(proxy.command(CHAT, *sent), stdout=subprocess.PIPE) as curl:
            assert curl.stdout is not None
            for _ in range(5):
                assert curl.stdout.readline().startswith(b"data: {")
                assert curl.stdout.readline() == b"\n"
            # The frames came long before the answer's end.
            assert wait_for(lambda: standing.metrics()["num_requests_running"] == 1)
            curl.kill()
        assert wait_for(lambda: standing.metrics()["num_requests_running"] == 0)
    proxy.server.suffer("")
