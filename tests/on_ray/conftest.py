"""A cluster of three nodes as processes of this machine, and clients of what runs on it.

Three engines, TLS at Ray's proxy, and keys in a file.
Runs in Ray's environment. Nodes have two CPUs and an engine takes two: one engine a node.
"""

import asyncio
import contextlib
import ssl
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from support.running import free_port

from vlmserve.server.ray.application import app

KEY = "on-ray"
MODEL = "vlmserve-tiny-vision"
ROOT = Path(__file__).resolve().parents[2]
GERMAN = ROOT / "examples" / "german"
OPTIONS = {
    "lora": [f"german={GERMAN}"],
    "dtype": "float32",
    "device": "cpu",
    "spare_engine": False,
    "kv_cache_memory": "128MiB",
    "num_threads": 1,
}
CERTIFICATE = str(ROOT / "tests" / "data" / "tls_test_only.pem")
NODE = {
    "node_ip_address": "127.0.0.1",
    "num_cpus": 2,
    "object_store_memory": 80 * 2**20,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
    # Ray would wait for 30 s.
    "wait": False,
}
# Far off: on two cores shared with two other test processes, two engines that started at once were
# not ready after 200 s.
FAR_S = 900.0


@dataclass(frozen=True)
class Size:
    """How much the checks do.

    most_engines: after scaling up. pause_s: of clients that only have to be there, between their
    requests: what they ask takes cores from what they wait for.
    """

    conversations: int
    turns: int
    most_engines: int
    pause_s: float


SHORT, LONG = Size(100, 3, 2, 0.5), Size(200, 5, 3, 0.2)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the size of `make torture`")


@pytest.fixture(scope="session")
def size(request):
    return LONG if request.config.getoption("--long") else SHORT


@dataclass
class Running:
    """The cluster, the URL of its head's proxy, and of all engines the file of keys and the
    watched folder of adapters.
    """

    cluster: Cluster
    url: str
    keys: Path
    adapters: Path

    def deploy(self, **args):
        """Deploy the application, or change it; returns when it is healthy."""
        options = OPTIONS | {"api_key_file": str(self.keys)}
        options |= {"lora_source": str(self.adapters), "lora_refresh": 0.5}
        options |= args.pop("options", {})
        serve.run(app({"cpus": 2, "options": options} | args), name="vlmserve")

    def nodes_with_engines_alone(self):
        """The nodes, not the head, whose death takes an engine and no ingress."""
        actors = ray._private.state.actors().values()
        alive = [actor for actor in actors if actor["State"] == "ALIVE"]
        routing = {one["Address"]["NodeID"] for one in alive if "#ingress#" in one["Name"]}
        return [one for one in self.cluster.worker_nodes if one.node_id not in routing]

    def client(self, url=None):
        """A client of the ingress, or of another server."""
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx2.AsyncClient(
            base_url=url or self.url,
            headers=headers,
            timeout=FAR_S,
            verify=ssl._create_unverified_context(),
            trust_env=False,
        )


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\n")
    adapters = tmp_path_factory.mktemp("adapters")
    cluster = Cluster()
    for _ in range(3):
        cluster.add_node(**NODE)
    cluster.wait_for_nodes(FAR_S)
    port = free_port()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        http = {"host": "127.0.0.1", "port": port}
        http |= {"ssl_certfile": CERTIFICATE, "ssl_keyfile": CERTIFICATE}
        serve.start(proxy_location="HeadOnly", http_options=http)
        made = Running(cluster, f"https://127.0.0.1:{port}", keys, adapters)
        made.deploy(replicas=3)
        yield made
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def chat(content, **fields):
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0} | fields


@dataclass
class Load:
    """Requests that follow each other, until `stop`: what became of them, and who answered.

    outcomes: "whole", "error event", "status 503" or the name of a client's error.
    """

    outcomes: Counter = field(default_factory=Counter)
    replicas: Counter = field(default_factory=Counter)
    recent: list = field(default_factory=list)
    is_stopped: bool = False

    async def ask(self, client, body):
        """One request; streams and whole answers alike."""
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                text = (await answer.aread()).decode()
        except httpx2.TransportError as error:
            self.outcomes[type(error).__name__] += 1
            return
        if answer.status_code != 200:
            self.outcomes[f"status {answer.status_code}"] += 1
            return
        replica = answer.headers["X-Replica"]
        self.replicas[replica] += 1
        self.recent.append(replica)
        is_whole = text.endswith("data: [DONE]\n\n") if body.get("stream") else True
        is_failed = '"error"' in text or not is_whole
        self.outcomes["error event" if is_failed else "whole"] += 1

    async def run(self, running, number, pause_s=0.0, **fields):
        """`number` clients at once, each with a request after the other, and a pause between."""

        async def one(client, name):
            turn = 0
            while not self.is_stopped:
                turn += 1
                await self.ask(client, chat(f"Hello {name} {turn}", **fields))
                await asyncio.sleep(pause_s)

        async with running.client() as client:
            await asyncio.gather(*(one(client, name) for name in range(number)))


@contextlib.contextmanager
def under_load(running, number, pause_s=0.0, **fields):
    """A load in a thread until the block ends; all of its requests have then ended."""
    load = Load()
    thread = threading.Thread(
        target=lambda: asyncio.run(load.run(running, number, pause_s, **fields)), daemon=True
    )
    thread.start()
    try:
        yield load
    finally:
        load.is_stopped = True
        thread.join(FAR_S)
        assert not thread.is_alive(), f"a request did not end: {load}"
