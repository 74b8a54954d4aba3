"""X-Replica and X-Image-Digests: what a gateway learns from an answer."""

from __future__ import annotations

import asyncio

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

from vlmserve.server.telemetry.request_record import current_record

TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"
TALK = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
MANY = {"model": MODEL, "messages": [{"role": "user", "content": [IMAGE] * 3}]}


class ReplicatedEngine(ScriptedEngine):
    """As a pool of replicas does, notes the one that gets the request."""

    async def generate(self, *requests):
        current_record().replica = 2
        async for output in super().generate(*requests):
            yield output


def answers(checkpoint, *bodies, engine=ScriptedEngine, **settings):
    async def run():
        scripted = engine(lambda request: list(tokens_one_by_one(TOKENIZER, " a helpful")))
        async with client_of(checkpoint, scripted, **settings) as client:
            found = [await client.post(CHAT, json=body) for body in bodies]
            return [*found, await client.get("/v1/models")]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("engine", "name", "shown"),
    [
        (ScriptedEngine, None, None),
        (ScriptedEngine, "pod-a", "pod-a"),
        (ReplicatedEngine, None, "2"),
        (ReplicatedEngine, "pod-a", "pod-a/2"),
    ],
)
def test_answers_name_the_server_and_its_engine(checkpoint, engine, name, shown):
    bodies = TALK, TALK | {"stream": True}, TALK | {"messages": []}
    plain, streamed, refused, models = answers(
        checkpoint, *bodies, engine=engine, replica_name=name
    )
    assert plain.headers.get("x-replica") == streamed.headers.get("x-replica") == shown
    assert "x-replica" not in models.headers
    assert refused.status_code == 400
    assert "x-replica" not in refused.headers


def test_answers_name_the_digests_of_their_images_in_order(checkpoint):
    text, many, streamed, _ = answers(checkpoint, TALK, MANY, MANY | {"stream": True})
    assert "x-image-digests" not in text.headers
    digests = many.headers["x-image-digests"].split(", ")
    assert len(digests) == 3
    assert len(set(digests)) == 1, "the same file has the same digest"
    assert streamed.headers["x-image-digests"] == many.headers["x-image-digests"]
