"""Two servers behind the gateways of deploy/gateways, as shipped; one server is killed under load.

Each gateway comes from the wheels that requirements/gateways/ pins, nginx from the system. A test
is skipped where its gateway cannot be had. `bench/gateways.py` does the same with more requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from support.client_environments import gateway_python
from support.polling import wait_until

import gateways
from processes import free_port, running
from vlmserve.server.bench.client import Client

PICKER = Path(__file__).resolve().parents[1] / "support" / "endpoint_picker.py"
NUM_REQUESTS, NUM_CLIENTS, NUM_TALKS = 60, 8, 6
# How a started answer ends when its server dies; nothing else may go wrong.
CUT = {"connection", "cut stream", "error event"}


@pytest.fixture(scope="module")
def servers():
    with gateways.pair() as both:
        yield both


def programs_of(name):
    """The folder of a gateway's program, or a skip."""
    if name == "nginx":
        if not Path("/usr/sbin/nginx").exists():
            pytest.skip("needs nginx: apt-get install nginx-light")
        return Path("/usr/sbin")
    try:
        return gateway_python(name).parent
    except subprocess.SubprocessError:
        pytest.skip(f"the wheels of requirements/gateways/{name}.txt cannot be had")


def test_every_gateway_has_its_file_and_stands_on_the_page():
    page = (gateways.DEPLOY.parents[1] / "docs/how-to/gateways.md").read_text()
    files = {path.name for path in gateways.DEPLOY.iterdir() if path.is_file()}
    assert files == {*gateways.FILES.values(), "servers.sh"}
    for name in files:
        assert name in page


@pytest.mark.slow
@pytest.mark.parametrize("name", gateways.FILES)
def test_a_killed_server_costs_only_its_open_answers_and_comes_back(servers, name):
    options = argparse.Namespace(
        program=str(programs_of(name)),
        policy="",
        requests=NUM_REQUESTS,
        clients=NUM_CLIENTS,
        conversations=NUM_TALKS,
    )
    found = gateways.run(name, servers, options)
    # sglang-router listed it as `unknown`.
    assert found["models"] == [gateways.MODEL_NAMES.get(name, gateways.MODEL)]
    assert found["found_their_picture"] == found["later_turns"] == NUM_TALKS * 2
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == NUM_REQUESTS
    assert set(outcomes) <= CUT | {"answered"}, found["errors"]
    # Each client has one request open at most.
    assert outcomes["answered"] >= NUM_REQUESTS - NUM_CLIENTS


@contextlib.contextmanager
def llm_d(servers, folder):
    """Envoy and a stand-in for llm-d's endpoint picker, with the shipped files.

    Yields the address, the file of endpoints, and the file of what the picker scraped.
    """
    programs, ports = programs_of("envoy"), {"8080": free_port(), "9002": free_port()}
    ports |= {"8001": servers.ports["one"], "8002": servers.ports["two"]}
    for name in ("envoy.yaml", "epp.yaml", "endpoints.yaml"):
        text = gateways.shipped(f"llm-d/{name}", {key: str(port) for key, port in ports.items()})
        (folder / name).write_text(text)
    scraped = folder / "scraped"
    command = [programs / "python", PICKER, folder / "endpoints.yaml", folder / "epp.yaml"]
    with scraped.open("wb") as out:
        picker = subprocess.Popen([*command, str(ports["9002"])], stdout=out)
    try:
        # Its first answers need a scrape of both.
        assert wait_until(lambda: len(last_scrape(scraped)) == 2, 120)
        url = f"http://127.0.0.1:{ports['8080']}"
        envoy = [str(programs / "envoy"), "-c", str(folder / "envoy.yaml"), "--log-level", "error"]
        with running([*envoy, "--use-dynamic-base-id"], f"{url}/v1/health/ready"):
            yield url, folder / "endpoints.yaml", scraped
    finally:
        picker.kill()
        picker.wait()


def last_scrape(file):
    lines = file.read_text().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {}


async def streams(url, model, count):
    async with Client(f"{url}/v1", gateways.KEY, timeout_s=gateways.HANG_S) as client:
        bodies = gateways.bodies_of(model, count)
        return await asyncio.gather(*(client.chat(body) for body in bodies))


@pytest.mark.slow
def test_an_endpoint_picker_scrapes_and_finds_the_server_that_saw_a_picture(servers, tmp_path):
    """By pictures alone: the conversations differ in nothing else, and send no session."""
    with llm_d(servers, tmp_path) as (url, endpoints, scraped):
        figures = last_scrape(scraped)
        assert set(figures) == {f"127.0.0.1:{port}" for port in servers.ports.values()}
        for one in figures.values():
            assert one["waiting"] == one["running"] == one["kv"] == 0.0
            assert one["block_size"] > 0
            assert one["num_gpu_blocks"] > 0
        found = gateways.converse(url, gateways.MODEL, NUM_TALKS)
        assert found["found_their_picture"] == found["later_turns"]
        assert set(found["served"]) == {"one", "two"}
        samples = asyncio.run(streams(url, gateways.MODEL, 16))
        assert [sample.error for sample in samples] == [None] * 16
        assert all(len(sample.chunk_times) > 1 for sample in samples)
        only_one = yaml.safe_load(endpoints.read_text())
        only_one["endpoints"] = only_one["endpoints"][:1]
        fresh = endpoints.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(only_one))
        os.replace(fresh, endpoints)
        assert wait_until(lambda: len(last_scrape(scraped)) == 1, 60)
        assert set(gateways.converse(url, gateways.MODEL, 3)["served"]) == {"one"}
