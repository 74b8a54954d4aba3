"""The caches as a client meets them: whose they are, what usage tells, what /metrics counts."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    client_of,
)

from vlmserve.router.messages import EngineStats, SequenceOutput

CHAT = "/v1/chat/completions"
STACK = "/inference/chat_completion"
PARTS = [
    {"type": "text", "text": "What is in this image?"},
    {"type": "image_url", "image_url": {"url": "https://host/a.png"}},
]
BODY = {"model": MODEL, "messages": [{"role": "user", "content": PARTS}]}
STACK_BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What is this?"}]}


def answers(num_cached_tokens):
    """A script: three tokens in two outputs, the first with the cached tokens."""
    return lambda request: [
        SequenceOutput(request_id="r", token_ids=[3923, 374], num_cached_tokens=num_cached_tokens),
        SequenceOutput(request_id="r", token_ids=[128009], finish_reason="stop"),
    ]


def serve(checkpoint, use, num_cached_tokens=0, **settings):
    """Run `use(client)` against a server; the engine and the images with what they got."""

    async def run():
        engine, images = ScriptedEngine(answers(num_cached_tokens)), OneTileImages()
        async with client_of(checkpoint, engine, images=images, **settings) as client:
            result = await use(client, engine)
        return result, engine, images

    return asyncio.run(run())


def tenants(checkpoint, *calls, **settings):
    """The engine's tenant for each call (path, body, key), after a check of the images'."""

    async def use(client, engine):
        for path, body, key in calls:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            response = await client.post(path, json=body, headers=headers)
            assert response.status_code == 200, response.text

    _, engine, images = serve(checkpoint, use, **settings)
    found = [request.tenant for request in engine.requests]
    with_images = [one.tenant for one in engine.requests if one.images]
    assert [image.tenant for image in images.requests] == with_images
    return found


def test_without_keys_and_salt_all_share_one_cache(checkpoint):
    calls = [(CHAT, BODY, None), (CHAT, BODY, "ignored"), (STACK, STACK_BODY, None)]
    assert tenants(checkpoint, *calls) == ["", "", ""]


def test_each_key_and_each_salt_has_a_cache_of_its_own(checkpoint):
    salted = BODY | {"cache_salt": "s"}
    calls = [
        (CHAT, BODY, "k1"), (CHAT, BODY, "k2"), (CHAT, salted, "k1"), (CHAT, salted, "k2"),
        (CHAT, BODY | {"cache_salt": "t"}, "k1"),
    ]  # fmt: skip
    found = tenants(checkpoint, *calls, api_keys=["k1", "k2"])
    assert len(set(found)) == 5
    assert "" not in found
    assert not any("k1" in tenant or "k2" in tenant for tenant in found)
    again = tenants(checkpoint, (CHAT, BODY, "k1"), (STACK, STACK_BODY, "k1"), api_keys=["k1"])
    assert again == [found[0]] * 2


def test_a_salt_keeps_apart_without_keys_too(checkpoint):
    salted = [(CHAT, BODY | {"cache_salt": salt}, None) for salt in ("a", "b", "a")]
    one, other, again = tenants(checkpoint, *salted)
    assert one == again != other


def test_a_key_and_a_salt_cannot_pass_for_another_pair(checkpoint):
    calls = [
        (CHAT, BODY | {"cache_salt": "b"}, "ka"),
        (CHAT, BODY | {"cache_salt": "ab"}, "k"),
    ]
    one, other = tenants(checkpoint, *calls, api_keys=["ka", "k"])
    assert one != other


@pytest.mark.parametrize("salt", ["", "x" * 257, 7])
def test_a_salt_of_no_or_too_many_characters_is_refused(checkpoint, salt):
    async def use(client, engine):
        return await client.post(CHAT, json=BODY | {"cache_salt": salt})

    response, _, _ = serve(checkpoint, use)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"


def test_usage_tells_of_cached_tokens_only_where_there_are_any(checkpoint):
    async def use(client, engine):
        plain = (await client.post(CHAT, json=BODY)).json()["usage"]
        streamed = BODY | {"stream": True, "stream_options": {"include_usage": True}}
        lines = (await client.post(CHAT, json=streamed)).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return plain, chunks[-1]["usage"]

    for usage in serve(checkpoint, use, num_cached_tokens=16)[0]:
        assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
        assert usage["completion_tokens"] == 3
    for usage in serve(checkpoint, use)[0]:
        assert "prompt_tokens_details" not in usage


def test_metrics_tell_of_both_caches(checkpoint):
    async def use(client, engine):
        engine.stats = EngineStats(
            text_blocks_used=1, text_blocks_cached=2, text_blocks_total=4, image_blocks_cached=3,
            image_cache_hits=4, image_cache_misses=5, image_cache_evictions=6,
            prefix_tokens_queried=7, prefix_tokens_hit=8,
        )  # fmt: skip
        return (await client.get("/metrics")).text

    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(serve(checkpoint, use)[0])
        for sample in family.samples
    }
    assert values["gpu_cache_usage_perc"] == 0.25
    assert values["vlmserve_text_blocks_cached"] == 2
    assert values["vlmserve_image_blocks_cached"] == 3
    assert values["vlmserve_image_cache_hits_total"] == 4
    assert values["vlmserve_image_cache_misses_total"] == 5
    assert values["vlmserve_image_cache_evictions_total"] == 6
    assert values["vlmserve_prefix_cache_queried_tokens_total"] == 7
    assert values["vlmserve_prefix_cache_hit_tokens_total"] == 8


def test_a_second_turn_about_a_picture_encodes_nothing_and_computes_little(
    server, draw_picture, wait_for
):
    picture = draw_picture(77, num_shapes=2)

    def ask(messages):
        body = {"model": "vlmserve-tiny-vision", "messages": messages, "temperature": 0}
        answer = httpx2.post(f"{server.url}{CHAT}", json=body | {"max_tokens": 32}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    image = {"type": "image_url", "image_url": {"url": picture.url}}
    turns = [{"role": "user", "content": [image, {"type": "text", "text": "What shape is it?"}]}]
    encoded = server.metric("vlmserve_images_encoded_total")
    first = ask(turns)
    assert wait_for(lambda: server.metric("vlmserve_images_encoded_total") == encoded + 1)
    hits = server.metric("vlmserve_image_cache_hits_total")
    turns.append({"role": "assistant", "content": first["choices"][0]["message"]["content"]})
    turns.append({"role": "user", "content": "How many shapes are there?"})
    second = ask(turns)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    assert wait_for(lambda: server.metric("vlmserve_image_cache_hits_total") == hits + 1)
    assert server.metric("vlmserve_images_encoded_total") == encoded + 1
