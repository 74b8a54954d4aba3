"""Two servers behind a gateway of deploy/gateways: one is killed under load; clients count answers.

    python bench/gateways.py --gateway vllm-router --requests 1000
    python bench/gateways.py --gateway nginx --program build/gateways/nginx/bin --conversations 20

First conversations of three turns about a picture each: a later turn finds its picture if the
server that answers has answered this conversation before. Then streamed requests, half of them
about a picture; when half of them were sent, every process of one server is killed. Then that
server starts again, and the script waits until the gateway sends to it. The shipped files are run
as they are, but for their ports. The last line printed is one JSON document.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from processes import arguments, free_port, print_document, running
from server_state import descendants
from vlmserve.server.bench.client import Client, Sample
from vlmserve.server.bench.load import request_bodies, unique_pictures
from vlmserve.server.bench.settings import Load

DEPLOY = Path(__file__).parents[1] / "deploy" / "gateways"
MODEL = "vlmserve-tiny-vision"
# Of the servers, and in front of LiteLLM: a random one, which it demands.
KEY = secrets.token_hex(32)
FILES = {
    "vllm-router": "vllm-router.sh",
    "sglang-router": "sglang-router.sh",
    "nginx": "nginx.conf",
    "litellm": "litellm.yaml",
    "envoy": "envoy.yaml",
}
# The name of a model as clients of this gateway write it.
MODEL_NAMES = {"litellm": "vision"}
# What keeps a conversation together, by each gateway's name for it.
SESSION_HEADERS = ("X-Session-Id", "X-SMG-Routing-Key", "x-litellm-session-id")
# The ports of the shipped files.
GATEWAY, FIRST, SECOND, METRICS = "8080", "8001", "8002", "29000"
HANG_S = 120.0
RETURN_S = 90.0
TURNS = 3
# No gateway reports to its maker or looks for a list of prices.
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DISABLE_ADMIN_UI": "True"}


@dataclass(slots=True)
class Pair:
    """Two servers as processes, named `one` and `two`."""

    stack: contextlib.ExitStack
    ports: dict[str, int] = field(default_factory=lambda: {n: free_port() for n in ("one", "two")})
    pids: dict[str, int] = field(default_factory=dict)
    open_at_kill: float = 0.0

    def metric(self, name: str, metric: str) -> float:
        """The value of a server's metric, which has no labels."""
        headers = {"Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[name]}/metrics", None, headers
        )
        with urllib.request.urlopen(request, timeout=HANG_S) as response:
            found = re.search(rf"(?m)^{metric} (\S+)$", response.read().decode())
        assert found is not None, metric
        return float(found[1])

    def start(self, name: str) -> None:
        """Start a server and wait until it is ready."""
        port = self.ports[name]
        command = [sys.executable, "-m", "vlmserve.server", "serve", "--port", str(port)]
        command += ["--replica-name", name, "--no-log-requests", "--no-spare-engine"]
        command += ["--metrics-names", "vllm", "--open-metrics", "--repeated-key"]
        url = f"http://127.0.0.1:{port}/v1/health/ready"
        env = os.environ | {"VLMSERVE_API_KEY": KEY}
        self.pids[name] = self.stack.enter_context(running(command, url, env)).pid

    def kill(self, name: str) -> None:
        """Kill every process of a server at once, as the end of its machine does."""
        pid = self.pids[name]
        self.open_at_kill = self.metric(name, "num_requests_running")
        for one in (pid, *descendants(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    """Two servers of the bundled model, until the block ends."""
    with contextlib.ExitStack() as stack:
        servers = Pair(stack)
        for name in servers.ports:
            servers.start(name)
        yield servers


def shipped(file: str, ports: dict[str, str]) -> str:
    """The text of a shipped file with other ports."""
    text = (DEPLOY / file).read_text()
    return re.sub("|".join(ports), lambda match: ports[match[0]], text)


def command_of(name: str, file: Path, port: int) -> list[str]:
    """How to run a shipped file that was written to `file`."""
    if name == "litellm":
        return ["litellm", "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    if name == "envoy":
        return ["envoy", "-c", str(file), "--log-level", "error", "--use-dynamic-base-id"]
    if name == "nginx":
        return ["nginx", "-p", str(file.parent), "-c", str(_whole_nginx(file))]
    return ["sh", str(file)]


def _whole_nginx(file: Path) -> Path:
    """A whole configuration around the shipped one, which is a part of /etc/nginx."""
    folder = file.parent
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{one}_temp_path {folder}/{one};\n" for one in paths)
    # Its workers else leave root, and cannot write here.
    user = "user root root; " if os.geteuid() == 0 else ""
    whole = folder / "whole.conf"
    whole.write_text(
        f"{user}daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log off; {temporary} include {file}; }}\n"
    )
    return whole


@contextlib.contextmanager
def gateway(name: str, servers: Pair, program: str, policy: str) -> Iterator[str]:
    """Run a gateway in front of both servers; yields its address. program: its folder."""
    port = free_port()
    ports = {GATEWAY: str(port), METRICS: str(free_port())}
    ports |= {FIRST: str(servers.ports["one"]), SECOND: str(servers.ports["two"])}
    env = os.environ | QUIET | {"VLMSERVE_API_KEY": KEY, "LITELLM_MASTER_KEY": KEY}
    env["PATH"] = os.pathsep.join([program, env["PATH"], "/usr/sbin"])
    if policy:
        env["POLICY"] = policy
    with TemporaryDirectory() as folder:
        file = Path(folder) / FILES[name]
        file.write_text(shipped(FILES[name], ports))
        url = f"http://127.0.0.1:{port}"
        command = command_of(name, file, port)
        ready = "/health/liveliness" if name == "litellm" else "/v1/health/ready"
        ready = "/health" if name.endswith("-router") else ready
        with running(["/usr/bin/env", *command], url + ready, env):
            yield url


@dataclass(slots=True)
class Talk:
    """A conversation about one picture. served_by: the servers that answered its turns."""

    number: int
    picture: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    served_by: list[str] = field(default_factory=list)

    def ask(self, url: str, model: str) -> None:
        """Send the next turn, with the whole conversation before it."""
        image = {"type": "image_url", "image_url": {"url": self.picture}}
        text: dict[str, Any] = {
            "type": "text",
            "text": "What is it?" if not self.messages else "And?",
        }
        content = [text] if self.messages else [image, text]
        self.messages.append({"role": "user", "content": content})
        answer, server = ask(url, model, self.messages, f"talk-{self.number}")
        self.messages.append({"role": "assistant", "content": answer})
        self.served_by.append(server)

    @property
    def hits(self) -> int:
        """Later turns at a server that has seen the picture."""
        seen = self.served_by
        return sum(server in seen[:turn] for turn, server in enumerate(seen))


def ask(url: str, model: str, messages: list[dict[str, Any]], session: str) -> tuple[str, str]:
    """One plain request; returns the answer's text and the server's name."""
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 8}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    headers |= dict.fromkeys(SESSION_HEADERS, session)
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=HANG_S) as response:
        # LiteLLM puts a name before the servers' own headers.
        named = {k.lower().rpartition("llm_provider-")[2]: v for k, v in response.headers.items()}
        answer = json.loads(response.read())
    return answer["choices"][0]["message"]["content"], named["x-replica"]


def converse(url: str, model: str, count: int) -> dict[str, Any]:
    """Hold conversations side by side: every first turn, then every second one, and so on."""
    pictures = unique_pictures([(224, 224)], seed=1)
    talks = [Talk(number, next(pictures)) for number in range(count)]
    for _ in range(TURNS):
        for talk in talks:
            talk.ask(url, model)
    served = Counter(server for talk in talks for server in talk.served_by)
    later = count * (TURNS - 1)
    return {
        "later_turns": later,
        "found_their_picture": sum(talk.hits for talk in talks),
        "served": dict(served),
    }


@dataclass(slots=True)
class Clients:
    """Several clients that stream all requests; `at_half` is called when half of them were sent."""

    url: str
    bodies: list[bytes]
    num_clients: int
    samples: list[Sample] = field(default_factory=list)
    sent: int = 0

    async def run(self, at_half: Any) -> Self:
        """Send all requests, each once; no failed one is sent again."""
        async with Client(f"{self.url}/v1", KEY, timeout_s=HANG_S) as client:
            await asyncio.gather(*(self._ask(client, at_half) for _ in range(self.num_clients)))
        return self

    async def _ask(self, client: Client, at_half: Any) -> None:
        while self.bodies:
            body = self.bodies.pop()
            self.sent += 1
            headers = [(name, f"load-{self.sent}") for name in SESSION_HEADERS]
            if self.sent == (self.sent + len(self.bodies)) // 2:
                await asyncio.to_thread(at_half)
            self.samples.append(await client.chat(body, headers=headers))


def bodies_of(model: str, count: int) -> list[bytes]:
    """Half of the requests have one of eight pictures, half are of text alone."""
    part = {"max_tokens": 16, "ignore_eos": True, "prompt_words": 8}
    with_picture = request_bodies(Load(count // 2, image_pool=8, **part), model)
    of_text = request_bodies(Load(count - count // 2, num_images=0, **part), model)
    pairs = zip(of_text, with_picture, strict=False)
    return [body for one in pairs for body in one] + of_text[len(with_picture) :]


def models_of(url: str) -> list[str]:
    """The names that a gateway lists. It may be ready before it has found a healthy server."""
    request = urllib.request.Request(f"{url}/v1/models", None, {"Authorization": f"Bearer {KEY}"})
    started = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(request, timeout=HANG_S) as response:
                return [one["id"] for one in json.loads(response.read())["data"]]
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() - started > RETURN_S:
                raise
        time.sleep(0.1)


def wait_for_return(url: str, model: str, name: str) -> float:
    """Seconds until a gateway sends to a server again. Raises TimeoutError."""
    started, number = time.monotonic(), 0
    while time.monotonic() - started < RETURN_S:
        number += 1
        words = [{"role": "user", "content": f"{number} times {number * 7919} is?"}]
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if ask(url, model, words, f"new-{number}")[1] == name:
                return time.monotonic() - started
        time.sleep(0.1)
    raise TimeoutError(f"the gateway did not send to server {name} in {RETURN_S:.0f} s")


def run(name: str, servers: Pair, options: Any) -> dict[str, Any]:
    """All parts of the script for one gateway; both servers run before and after."""
    model = MODEL_NAMES.get(name, MODEL)
    with gateway(name, servers, options.program, options.policy) as url:
        talks = {"models": models_of(url)} | converse(url, model, options.conversations)
        clients = Clients(url, bodies_of(model, options.requests), options.clients)
        asyncio.run(clients.run(lambda: servers.kill("two")))
        servers.start("two")
        back_s = wait_for_return(url, model, "two")
    outcomes = Counter(sample.error or "answered" for sample in clients.samples)
    errors = {sample.error: sample.detail for sample in clients.samples if sample.error}
    return {
        **talks,
        "open_at_kill": servers.open_at_kill,
        "outcomes": dict(outcomes),
        "errors": errors,
        "back_s": round(back_s, 1),
    }


def main() -> None:
    options = arguments(
        __doc__,
        gateway=list(FILES),
        program=("", "folder of the gateway's program; default: found by PATH"),
        policy=("", "of vllm-router and sglang-router; default: that of the file"),
        requests=1000,
        clients=16,
        conversations=20,
    )
    with pair() as servers:
        print_document(options, **run(options.gateway, servers, options))


if __name__ == "__main__":
    main()
