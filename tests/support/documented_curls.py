"""Runs every curl of the reference as it stands against a real worker and engine.

    unshare -rn python tests/support/documented_curls.py SOCKET

SOCKET: of an engine that runs the bundled model; the worker is this process. In a network namespace
of its own, as the curls name port 8000. The https picture they name is served on loopback, by a
resolver and a connector of this script and a certificate that only it trusts. Prints one JSON
document: the answer of each curl, and what the picture shows.
"""

import fcntl
import http.server
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy
from support.polling import wait_until
from support.running import START_TIMEOUT_S

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.dataset.questions import describe
from vlmserve.models.bundled.pictures import draw, encode, random_scene
from vlmserve.server.images.fetch import ImageFetcher, TcpConnector
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.settings import ServerSettings
from vlmserve.server.worker.app import build_app

DATA = Path(__file__).resolve().parent.parent / "data"
PUBLIC_ADDRESS = "198.35.26.112"
NAME = "meta/llama-3.2-11b-vision-instruct"
SCENE = random_scene(numpy.random.default_rng(1), num_shapes=1, size=(640, 480))


def bring_up_loopback() -> None:
    """`ip link set lo up` without the ip command."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh", b"lo", 1)  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


class PictureHandler(http.server.BaseHTTPRequestHandler):
    """Answers every path with one drawn picture."""

    picture = encode(draw(SCENE), "JPEG")

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(self.picture)))
        self.end_headers()
        self.wfile.write(self.picture)

    def log_message(self, *_):
        pass


def serve_pictures() -> int:
    """An https server on loopback with the test certificate; returns its port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PictureHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(DATA / "tls_test_only.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


class OnlyWikimedia:
    """Resolves the documented picture's host, and nothing else."""

    async def resolve(self, host, port):
        if host != "upload.wikimedia.org":
            raise OSError("unknown name")
        return [PUBLIC_ADDRESS]


class ToLoopback:
    """Connects to the picture server where the judged public address was meant."""

    def __init__(self, port):
        self._port = port
        self._tcp = TcpConnector()

    async def connect(self, address, port, timeout_s):
        assert (address, port) == (PUBLIC_ADDRESS, 443)
        return await self._tcp.connect("127.0.0.1", self._port, timeout_s)


def wait_ready() -> None:
    assert wait_until(is_ready, START_TIMEOUT_S), "the server under test did not become ready"


def is_ready() -> bool:
    try:
        urllib.request.urlopen("http://127.0.0.1:8000/v1/health/ready", timeout=60).read()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def run_curls(answers: dict) -> None:
    """Every documented curl through a shell, just as a reader would paste it."""
    try:
        wait_ready()
        for path in sorted(DATA.glob("curl_*.sh")):
            done = subprocess.run(
                ["bash", "-c", path.read_text()], capture_output=True, timeout=120
            )
            answers[path.stem.removeprefix("curl_")] = json.loads(done.stdout)
    except Exception as error:  # reported to the test that runs this script
        answers["error"] = repr(error)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    bring_up_loopback()
    tls = ssl.create_default_context(cafile=str(DATA / "tls_test_only.pem"))
    answers: dict = {}
    fetcher = ImageFetcher(
        ImageSettings(),
        resolver=OnlyWikimedia(),
        connector=ToLoopback(serve_pictures()),
        ssl_context=tls,
    )
    settings = ServerSettings(
        model=str(CHECKPOINT), engine_socket=sys.argv[1], served_model_names=[NAME]
    )
    app = build_app(settings, fetcher=fetcher)
    threading.Thread(target=run_curls, args=(answers,), daemon=True).start()
    app.run(host="0.0.0.0", port=8000, single_process=True, access_log=False, motd=False)
    print(json.dumps({"answers": answers, "picture": describe(SCENE)}))


if __name__ == "__main__":
    main()
