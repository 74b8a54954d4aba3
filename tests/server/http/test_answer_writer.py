"""Answers with large bodies reach the transport in parts, to clients of HTTP/1.1 and 1.0."""

from __future__ import annotations

import asyncio
import json

import pytest
from sanic import HTTPResponse
from support.http_side import MODEL, ScriptedEngine, running_app, tokens_one_by_one
from support.http_side import meta_like_tokenizer as tokenizer

from vlmserve.server.api.whole_answer import send_parts
from vlmserve.server.http.answer_writer import PART_BYTES
from vlmserve.server.http.protocol import StrictProtocol
from vlmserve.server.settings import ServerSettings
from vlmserve.server.worker.app import build_app

PARTS = [bytes([65 + number]) * 50_000 for number in range(26)]
TEXT = b"".join(PARTS)
HEAD_BYTES = 1_000


async def whole(request):
    return HTTPResponse(TEXT, content_type="application/json")


async def in_parts(request):
    return await send_parts(request, PARTS)


async def short(request):
    return await send_parts(request, [b'{"a":', b"1}"])


ROUTES = {"/whole": whole, "/parts": in_parts, "/short": short}


def responses_to(checkpoint, monkeypatch, *heads):
    """What one connection answers to the heads, until it is closed; sizes of the writes."""
    sizes = []
    original = StrictProtocol.send

    async def send(self, data):
        sizes.append(len(data))
        await original(self, data)

    monkeypatch.setattr(StrictProtocol, "send", send)

    async def run():
        options = ServerSettings(
            model=str(checkpoint), engine_socket="", served_model_names=[MODEL]
        )
        engine = ScriptedEngine(lambda request: tokens_one_by_one(tokenizer(), "a"))
        app = build_app(options, engine_client=engine)
        for path, handler in ROUTES.items():
            app.add_route(handler, path, methods=["GET", "HEAD"], name=path[1:])
        async with asyncio.timeout(60), running_app(app) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":")[-1]))
            writer.write(b"".join(heads))
            received = await reader.read(-1)
            writer.close()
        return received

    return asyncio.run(run()), sizes


def head_of(path, version="1.1", method="GET", connection="close"):
    return (
        f"{method} {path} HTTP/{version}\r\nHost: localhost\r\nConnection: {connection}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/whole", "/parts"])
def test_a_large_body_is_written_in_parts_with_its_length(checkpoint, monkeypatch, path, version):
    """It was copied behind its head and given to the transport in one piece."""
    received, sizes = responses_to(checkpoint, monkeypatch, head_of(path, version))
    head, _, body = received.partition(b"\r\n\r\n")
    assert body == TEXT
    assert f"content-length: {len(TEXT)}".encode() in head.lower()
    assert b"transfer-encoding" not in head.lower()
    assert len(sizes) >= len(TEXT) // PART_BYTES
    assert max(sizes) <= PART_BYTES + HEAD_BYTES


def test_the_connection_serves_the_next_request_behind_a_body_in_parts(checkpoint, monkeypatch):
    first = head_of("/whole", connection="keep-alive") + head_of("/parts", connection="keep-alive")
    received, _ = responses_to(checkpoint, monkeypatch, first, head_of("/short"))
    assert received.count(b"HTTP/1.1 200") == 3
    assert received.count(TEXT) == 2
    assert received.endswith(b'\r\n\r\n{"a":1}')


def test_the_answer_to_head_has_the_length_of_a_large_body_and_no_body(checkpoint, monkeypatch):
    received, _ = responses_to(checkpoint, monkeypatch, head_of("/whole", method="HEAD"))
    assert f"content-length: {len(TEXT)}".encode() in received.lower()
    assert received.endswith(b"\r\n\r\n")


def test_other_tasks_run_between_the_parts():
    turns = []

    async def run():
        class Response:
            async def send(self, part):
                turns.append("part")

        class Request:
            async def respond(self, **head):
                assert head["headers"] == {"content-length": str(len(TEXT))}
                return Response()

        async def other():
            while True:
                turns.append("other")
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        await send_parts(Request(), list(PARTS))
        task.cancel()

    asyncio.run(run())
    assert turns.count("part") == len(PARTS)
    assert turns.count("other") >= len(PARTS) - 1


def test_a_short_document_is_one_write(checkpoint, monkeypatch):
    received, sizes = responses_to(checkpoint, monkeypatch, head_of("/short"))
    assert json.loads(received.partition(b"\r\n\r\n")[2]) == {"a": 1}
    assert len(sizes) == 1
