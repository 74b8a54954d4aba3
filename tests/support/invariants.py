"""What must hold around every hostile input and every fault: the four standing assertions.

    with standing.holds():                      # or holds(same_engine=False) in a crash row
        answer = standing.post(route, body)     # or anything else that reaches the server
        assert_error(answer, 400)               # 1. the answer is a JSON error body

Leaving the block asserts that 2. a probe answers within PROBE_S, 3. the engine is the same
process, and 4. blocks, image references, queue, descriptors and children are back where they
were. The bounds are the promised figures times SLACK, so that no test depends on the machine's
speed; bench/torture.py measures the figures themselves.

Owns the routes that generate, bodies for each, and how a server's state is read from /metrics
and /proc. Knows nothing of any single threat.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from support.polling import wait_until

from server_state import GAUGES, descendants

SLACK = 30.0
PROBE_S = 2.0
RETURN_S = 1.0
# Between two looks at a server that comes to rest: longer than a request of a probe.
REST_S = 0.1
MODEL = "vlmserve-tiny-vision"
CHAT = "/v1/chat/completions"
STACK_ROUTES = [
    prefix + path
    for prefix in ("", "/ls", "/experimental/ls")
    for path in (
        "/inference/chat_completion",
        "/alpha/inference/chat-completion",
        "/v1/inference/chat-completion",
    )
]
# Each prefix and each path of Llama Stack's once. That all nine have the handlers of these is what
# tests/server/routes/test_llama_stack.py asserts, so a row need not be run through all of them.
STACK_SPELLINGS = [STACK_ROUTES[0], STACK_ROUTES[4], STACK_ROUTES[8]]
# The handlers that take a conversation with pictures. A new one belongs here and in `body_for`.
GENERATION_ROUTES = [CHAT, *STACK_SPELLINGS]
COMPLETIONS = "/v1/completions"
# The handlers whose body reaches the engine.
TEXT_ROUTES = [*GENERATION_ROUTES, COMPLETIONS]
TOKENIZE_ROUTES = ["/tokenize", "/v1/tokenize"]
MESSAGES_ROUTES = ["/v1/messages", "/v1/messages/count_tokens"]
RESPONSES = "/v1/responses"
# The same handlers as without the prefix.
OPENAI_PREFIX = "/v1/openai"
PREFIXED_ROUTES = [OPENAI_PREFIX + CHAT, OPENAI_PREFIX + COMPLETIONS]
# Every route that takes a body.
BODY_ROUTES = [
    *(CHAT, *STACK_ROUTES, COMPLETIONS, *PREFIXED_ROUTES, RESPONSES),
    *(*MESSAGES_ROUTES, *TOKENIZE_ROUTES),
    *("/detokenize", "/v1/detokenize"),
]
# All that read a body; those that render and judge answer no text.
POSTED_ROUTES = [
    *(*BODY_ROUTES, "/v1/chat/completions/render", "/v1/completions/render", "/v1/moderations"),
]
# One path of each handler that reads a body, but for Llama Stack's: `STACK_SPELLINGS`. That they
# are all is what tests/server/api/test_error_matrix.py asserts.
BODY_HANDLERS = [
    *(*TEXT_ROUTES, RESPONSES, *MESSAGES_ROUTES, TOKENIZE_ROUTES[0], "/v1/detokenize"),
]
POSTED_HANDLERS = [*BODY_HANDLERS, *POSTED_ROUTES[len(BODY_ROUTES) :]]
# A 2 x 2 picture: enough to start decoders and to take an image block.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQV"
    "R42mM8ISfHwMDAxMDAwMDAAAANBAEIf62CUQAAAABJRU5ErkJggg=="
)
# Standing by for the next engine; it comes and goes by itself.
SPARE = "spare"
# Checking grammars: started when needed, up to so many, and killed over a slow one.
GRAMMARS = "grammars"
MAX_GRAMMARS = 2
# The pipes to each of them that the worker holds.
PIPES_OF_GRAMMARS = 2
KINDS = {
    b"vlmserve.router.engine.process": "engine",
    b"vlmserve.server.worker.process": "worker",
    b"vlmserve.server.images.decoder_child": "decoder",
    b"vlmserve.server.structured_output.compile_child": GRAMMARS,
}


class Server(Protocol):
    """What is used of the conftest's RunningServer."""

    port: int

    @property
    def process(self) -> Any: ...


@dataclass(slots=True)
class Answer:
    """One HTTP answer, its body read to the end."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def frames(self) -> list[str]:
        """The contents of a stream's `data:` frames."""
        return [
            one.removeprefix("data: ")
            for one in self.body.decode().split("\n\n")
            if one.startswith("data: ")
        ]


def body_for(
    route: str,
    text: str = "Hi",
    *,
    images: list[str] | None = None,
    max_tokens: int = 2,
    **more: Any,
) -> dict[str, Any]:
    """A body that `route` takes. images: URLs. more: fields in the route's own names."""
    route = route.removeprefix(OPENAI_PREFIX)
    if route in STACK_ROUTES:
        parts: list[Any] = [{"type": "text", "text": text}]
        parts += [{"type": "image", "image": {"url": {"uri": url}}} for url in images or []]
        sampling = {"strategy": {"type": "greedy"}, "max_tokens": max_tokens}
        turn = {"role": "user", "content": parts}
        return {"model_id": MODEL, "messages": [turn], "sampling_params": sampling} | more
    if route in (COMPLETIONS, *TOKENIZE_ROUTES):
        assert not images, f"{route} takes no pictures"
        limits = {"temperature": 0, "max_tokens": max_tokens} if route == COMPLETIONS else {}
        return {"model": MODEL, "prompt": text} | limits | more
    if route.endswith("/detokenize"):
        return {"model": MODEL, "tokens": [max_tokens]} | more
    if route == RESPONSES:
        limits = {"temperature": 0, "max_output_tokens": max_tokens}
        return {"model": MODEL, "input": text} | limits | more
    if route in MESSAGES_ROUTES:
        limits = {"max_tokens": max_tokens} if route == MESSAGES_ROUTES[0] else {}
        turns = [{"role": "user", "content": text}]
        return {"model": MODEL, "messages": turns} | limits | more
    assert route == CHAT, f"body_for does not know {route}: add it"
    parts = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in images or []]
    turn = {"role": "user", "content": parts}
    greedy = {"temperature": 0, "max_tokens": max_tokens}
    return {"model": MODEL, "messages": [turn]} | greedy | more


def text_of(content: dict[str, Any]) -> str:
    """The text of a plain answer of any route that generates."""
    if "completion_message" in content:
        return str(content["completion_message"]["content"])
    choice = content["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def raw_post(route: str, body: dict[str, Any]) -> bytes:
    """A whole request as it goes over the wire, for clients that do not read its answer."""
    content = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def assert_error(answer: Answer, *statuses: int) -> dict[str, Any]:
    """The answer is one of these statuses with the documented JSON body; gives its `error`."""
    assert answer.status in statuses, (answer.status, answer.body[:500])
    assert answer.headers["content-type"].startswith("application/json"), answer.headers
    content = answer.json
    assert content["object"] == "error"
    assert content["code"] == answer.status
    assert content["message"]
    assert content["type"]
    error: dict[str, Any] = content["error"]
    assert error["message"] == content["message"]
    # Anthropic's clients look for "error" at the top.
    assert content["type"] in (error["type"], "error")
    assert "Traceback" not in answer.body.decode()
    return error


def assert_stream_error(answer: Answer) -> dict[str, Any]:
    """The answer is a stream whose last content is an error frame; gives its `error`."""
    assert answer.status == 200, (answer.status, answer.body[:500])
    frames = answer.frames
    if frames[-1] == "[DONE]":
        frames = frames[:-1]
    error: dict[str, Any] = json.loads(frames[-1])["error"]
    assert error["message"]
    assert error["type"]
    return error


@dataclass(slots=True)
class Snapshot:
    """A server's state. children are counted by kind of process.

    descriptors: the most of any process of a kind. Of several alike, only those that have
    worked have opened everything.
    """

    engines: set[int]
    children: Counter[str]
    descriptors: Counter[str]
    gauges: dict[str, float]

    def exceeds(self, base: Snapshot) -> list[str]:
        """In words, what is not back at `base`."""
        found = []
        for name, value in self.gauges.items():
            if value != base.gauges[name]:
                found.append(f"{name} is {value}, was {base.gauges[name]}")
        if self.children != base.children:
            found.append(f"children are {dict(self.children)}, were {dict(base.children)}")
        for kind, count in self.descriptors.items():
            if count > base.descriptors[kind]:
                found.append(f"{kind} has {count} descriptors, had {base.descriptors[kind]}")
        return found


@dataclass
class Standing:
    """The standing assertions against one running server.

    headers go with every request: a key, where the server wants one. is_warm: everything
    that starts at its first use (grammar checks, the first picture) has been used.
    """

    server: Server
    headers: Mapping[str, str] = field(default_factory=dict)
    slack: float = SLACK
    is_warm: bool = False

    # Asking

    def post(self, route: str, body: Any, *, timeout_s: float = 60.0, **headers: str) -> Answer:
        """POST a body, as JSON unless it is bytes, on a connection of its own."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | headers
        return self.request("POST", route, data, sent, timeout_s)

    def get(self, path: str, timeout_s: float = 30.0) -> Answer:
        return self.request("GET", path, None, {}, timeout_s)

    def request(
        self,
        method: str,
        path: str,
        data: bytes | None,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> Answer:
        """One request on a connection of its own, read to its end."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=timeout_s)
        try:
            sent = {"Connection": "close", **self.headers, **headers}
            connection.request(method, urllib.parse.quote(path, safe="/?=&%"), data, sent)
            response = connection.getresponse()
            content = response.read()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, content, time.monotonic() - began)
        finally:
            connection.close()

    # What can be known of the server

    def metrics(self) -> dict[str, float]:
        """Every figure of /metrics by its name and labels, as they are written."""
        lines = self.get("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def processes(self) -> dict[int, str]:
        """The server's living processes and their kinds, the supervisor among them."""
        supervisor = self.server.process.pid
        return {supervisor: "supervisor"} | {pid: kind_of(pid) for pid in descendants(supervisor)}

    def pids(self, kind: str) -> list[int]:
        """The living processes of one kind: engine, worker, decoder, grammars or spare."""
        return sorted(pid for pid, one in self.processes().items() if one == kind)

    @property
    def engine_pid(self) -> int:
        (pid,) = self.pids("engine")
        return pid

    def snapshot(self) -> Snapshot:
        """The state at this moment, but for a spare engine and what checks grammars."""
        # A listing takes time: a child may end, and the next start, while it is made.
        assert wait_until(lambda: len(self.pids(GRAMMARS)) <= MAX_GRAMMARS, RETURN_S * self.slack)
        found = self.processes()
        passing = Counter(kind for kind in found.values() if kind in (SPARE, GRAMMARS))
        processes = {pid: kind for pid, kind in found.items() if kind not in passing}
        figures = self.metrics()
        descriptors: Counter[str] = Counter()
        for pid, kind in processes.items():
            descriptors[kind] = max(descriptors[kind], num_descriptors(pid))
        # The pipe on which a spare waits for its settings.
        descriptors["supervisor"] -= passing[SPARE]
        descriptors["worker"] -= passing[GRAMMARS] * PIPES_OF_GRAMMARS
        return Snapshot(
            engines={pid for pid, kind in processes.items() if kind == "engine"},
            children=Counter(processes.values()),
            descriptors=descriptors,
            gauges={name: figures[name] for name in GAUGES},
        )

    # Asserting

    def probe(self) -> Answer:
        """A harmless request is answered with 200 in time."""
        answer = self.post(CHAT, body_for(CHAT), timeout_s=PROBE_S * self.slack)
        assert answer.status == 200, (answer.status, answer.body[:500])
        assert answer.seconds < PROBE_S * self.slack
        return answer

    def warm_up(self) -> None:
        """Use everything once that is started at its first use. Further calls do nothing."""
        if self.is_warm:
            return
        patterns = [{"guided_regex": f"[a-z]{{1,{number}}}"} for number in (3, 4)]
        asked: list[dict[str, Any]] = [{}, {"images": [PICTURE]}, *patterns]
        # At once, so that every child that checks grammars is started.
        with ThreadPoolExecutor(len(asked)) as pool:
            bodies = [body_for(CHAT, **more) for more in asked]
            for answer in pool.map(lambda body: self.post(CHAT, body), bodies):
                assert answer.status == 200, (answer.status, answer.body[:500])
        self.is_warm = True

    def settled(self) -> Snapshot:
        """The state once nothing runs and no descriptor comes or goes."""
        looks = [self.snapshot()]

        def is_at_rest() -> bool:
            looks.append(self.snapshot())
            return looks[-1] == looks[-2] and not any(looks[-1].gauges.values())

        rests = wait_until(is_at_rest, RETURN_S * self.slack * 2, every_s=REST_S)
        assert rests, f"the server does not come to rest: {looks[-1]}"
        return looks[-1]

    @contextlib.contextmanager
    def holds(self, *, same_engine: bool = True) -> Iterator[Snapshot]:
        """The standing assertions around a block; gives the state before it."""
        self.warm_up()
        base = self.settled()
        yield base
        self.assert_returned(base)
        self.probe()
        if same_engine:
            assert self.snapshot().engines == base.engines, "the engine is another process"

    def assert_returned(self, base: Snapshot) -> None:
        """Everything is back at `base` in time; figures of the engine come by its heartbeat."""
        is_back = wait_until(lambda: not self.snapshot().exceeds(base), RETURN_S * self.slack)
        assert is_back, "; ".join(self.snapshot().exceeds(base))


class StandingElsewhere(Standing):
    """The same of a server whose processes cannot be seen: it answers afterwards."""

    @contextlib.contextmanager
    def holds(self, *, same_engine: bool = True) -> Iterator[None]:  # type: ignore[override]
        """A probe is answered after the block."""
        yield
        self.probe()


def kind_of(pid: int) -> str:
    """What a child of the server is, by its name or its command line."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone"
    if name == "vlmserve-engine":
        return "engine"  # one that was a spare too
    if b"--standby" in words:
        return SPARE
    return next((KINDS[word] for word in words if word in KINDS), "other")


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held."""
    return _status_bytes(pid, "VmHWM")


def resident_bytes(pid: int) -> int:
    """The memory that a process holds."""
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def num_descriptors(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0
