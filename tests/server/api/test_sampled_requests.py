"""Requests drawn at random from the document, in numbers: no answer is an error of the server."""

import asyncio
import collections
import contextlib
import json
import os
import re

import httpx2
import pytest
from support.fuzzed_server import fuzzed_server
from support.http_side import NO_AUTHORITIES
from support.request_sampler import RequestSampler

NUM_AT_ONCE = 4
REQUEST_TIMEOUT_S = 600.0
# UTF-16 has a zero byte between two letters.
LINK = re.compile(rb"(?i)h\0?t\0?t\0?p")


async def counted(num_requests: int, seed: int, **settings) -> collections.Counter:
    """Statuses of that many sampled requests; fails at the first that is the server's error.

    With TARGET, the address of a server that runs, they go there, without those that have a link.
    """
    target = os.environ.get("TARGET")
    statuses: collections.Counter = collections.Counter()
    async with (
        contextlib.nullcontext(target) if target else fuzzed_server(**settings) as url,
        httpx2.AsyncClient(
            base_url=url, timeout=REQUEST_TIMEOUT_S, verify=NO_AUTHORITIES, trust_env=False
        ) as client,
        asyncio.TaskGroup() as senders,
    ):
        sampler = RequestSampler((await client.get("/openapi.json")).json())
        numbers = iter(range(num_requests))

        async def send() -> None:
            for number in numbers:
                request = sampler.request(seed * 1_000_000 + number)
                # A server that runs would fetch it; and its live stream ends only with the reader.
                if target and (request.path == "/v1/live" or LINK.search(request.body or b"")):
                    continue
                response = await client.request(
                    request.method, request.path, content=request.body, headers=request.headers
                )
                statuses[response.status_code] += 1
                assert not is_server_error(response), (number, request, response.text)
                if sum(statuses.values()) % 5_000 == 0:
                    print(sum(statuses.values()), dict(statuses), flush=True)

        for _ in range(NUM_AT_ONCE):
            senders.create_task(send())
    return statuses


def is_server_error(response: httpx2.Response) -> bool:
    """True for a status from 500, and for a stream that reports one."""
    if response.status_code >= 500:
        return True
    is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    frames = response.text.split("\n") if is_stream else []
    return any('"server_error"' in line or '"api_error"' in line for line in frames)


def test_sampled_requests_are_never_the_servers_error():
    statuses = asyncio.run(counted(300, seed=1))
    # Many are accepted, and many are not: the sample has both.
    assert statuses[200] >= 60
    assert statuses[400] >= 60


def test_a_sampled_request_depends_on_its_seed_alone():
    number = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    body = {"content": {"application/json": {"schema": number}}}
    document = {
        "components": {"schemas": {}},
        "paths": {"/a": {"post": {"requestBody": body}}},
    }
    first, second = ([RequestSampler(document).request(n) for n in range(20)] for _ in "ab")
    assert first == second
    assert len({request.body for request in first}) > 5


@pytest.mark.fuzz
@pytest.mark.parametrize("task", ["generate", "moderation"])
def test_a_great_many_sampled_requests_are_never_the_servers_error(task):
    num_requests = int(os.environ.get("REQUESTS") or "10000")
    seed = int(os.environ.get("SEED") or "1")
    statuses = asyncio.run(counted(num_requests, seed, task=task))
    print(json.dumps({"requests": sum(statuses.values()), "statuses": statuses}))
    assert sum(statuses.values()) > num_requests / 2
