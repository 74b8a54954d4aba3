"""--metrics-port: health and metrics without a key, and nothing else."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket

import pytest
from support.http_side import ScriptedEngine, client_of, write_checkpoint
from support.running import faulty_serving, free_port

KEY = {"Authorization": "Bearer k"}
PORT_PLACES = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    settings = {"api_keys": ["k"], "allowed_hosts": ["api.example.com"], "metrics_names": "vllm"}
    folder = tmp_path_factory.mktemp("metrics-port")
    with faulty_serving(folder, server=settings, metrics_port=port) as running:
        yield running, port


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def asked(port, path, method="GET", headers=None, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/v1/health/live", "/v1/health/ready", "/health"])
def test_health_needs_no_key_and_no_host(server, path):
    assert asked(server[1], path)[0] == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/metrics", "//metrics", "/metrics/"])
def test_metrics_need_no_key_there_and_one_on_the_port_of_the_api(server, path):
    status, body = asked(server[1], path)
    assert status == 200
    assert b'vllm:num_requests_running{engine="0",model_name="vlmserve-tiny-vision"} 0.0' in body
    assert asked(server[0].port, path, headers={"Host": "api.example.com"})[0] == 401


def test_open_metrics_need_no_key_and_no_host_on_the_port_of_the_api(checkpoint):
    """llm-d's endpoint picker scrapes the address that it sends requests to, and sends no key."""

    async def use(open_metrics):
        settings = {"api_keys": ["k"], "allowed_hosts": ["a.example"], "open_metrics": open_metrics}
        async with client_of(checkpoint, ScriptedEngine(lambda request: []), **settings) as client:
            paths = ("/metrics", "/v1/metrics", "/v1/models")
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(use(True)) == [200, 200, 400]
    assert asyncio.run(use(False)) == [400, 400, 400]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/openapi.json", "/docs", "/", "/v1/metadata"]
)
@pytest.mark.parametrize("headers", [{}, KEY])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_row_75_nothing_else_is_served_there_even_with_a_key(server, path, headers, method):
    status, body = asked(server[1], path, method, headers, b"{}" if method == "POST" else None)
    assert status == 404
    assert "--metrics-port" in json.loads(body)["error"]["message"]


def test_a_hostile_head_is_refused_there_too(server):
    with socket.create_connection(("127.0.0.1", server[1]), timeout=60) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400")


def test_row_75_half_heads_leave_room_for_a_probe_and_for_the_api(server):
    clients = [socket.create_connection(("127.0.0.1", server[1]), 60) for _ in range(PORT_PLACES)]
    try:
        for client in clients:
            client.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert asked(server[1], "/metrics")[0] == 200
        headers = KEY | {"Host": "api.example.com"}
        assert asked(server[0].port, "/v1/models", headers=headers)[0] == 200
    finally:
        for client in clients:
            client.close()
