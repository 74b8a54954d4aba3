"""Requests go where their pictures are, and each replica answers as one server does."""

import asyncio
import base64
import io
import random
import shutil
import time
from collections import Counter

import pytest
from conftest import FAR_S, GERMAN, KEY, MODEL, Load, chat
from PIL import Image
from support.running import serving

AT_ONCE = 8


def picture(seed):
    """The URL of a small picture of noise, another for each seed."""
    pixels = random.Random(seed).randbytes(56 * 56 * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (56, 56), pixels).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


async def converse(client, seed, num_turns, load):
    """Turns about one picture; the replicas that answered them."""
    image = {"type": "image_url", "image_url": {"url": picture(seed)}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}]
    replicas = []
    for turn in range(num_turns):
        answer = await client.post("/v1/chat/completions", json=chat(messages, max_tokens=2))
        assert answer.status_code == 200, answer.text
        replicas.append(answer.headers["X-Replica"])
        said = answer.json()["choices"][0]["message"]["content"]
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": f"And what else, after {turn}?"},
        ]
    load.update(replicas)
    return replicas


async def metric(client, name):
    text = (await client.get("/metrics")).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_later_turns_find_their_picture_and_no_replica_has_far_more_than_the_mean(running, size):
    load = Counter()

    async def run():
        places = asyncio.Semaphore(AT_ONCE)

        async def one(client, seed):
            async with places:
                return await converse(client, seed, size.turns, load)

        async with running.client() as client:
            before = await metric(client, "vlmserve_image_cache_hits_total")
            conversations = await asyncio.gather(
                *(one(client, seed) for seed in range(size.conversations))
            )
            return conversations, await metric(client, "vlmserve_image_cache_hits_total") - before

    conversations, hits = asyncio.run(run())
    later = size.conversations * (size.turns - 1)
    stayed = sum(one.count(one[0]) - 1 for one in conversations)
    print(f"stayed {stayed}/{later}, found {hits:g}, load {dict(load)}")
    assert stayed >= 0.95 * later
    assert hits >= 0.95 * later
    assert len(load) == 3
    assert max(load.values()) <= 1.5 * sum(load.values()) / 3


def test_requests_of_an_adapter_stay_at_one_replica_and_none_is_loaded_by_a_request(running):
    """A load would reach one replica only, so its route is not served."""

    async def run():
        async with running.client() as client:
            body = chat("Thank you!", max_tokens=16) | {"model": "german"}
            answers = [await client.post("/v1/chat/completions", json=body) for _ in range(6)]
            other = await client.post("/v1/chat/completions", json=body | {"model": MODEL})
            load = {"lora_name": "a", "lora_path": "a"}
            loaded = await client.post("/v1/load_lora_adapter", json=load)
            return answers, other, loaded, (await client.get("/v1/models")).json()["data"]

    answers, other, loaded, models = asyncio.run(run())
    said = {one.json()["choices"][0]["message"]["content"] for one in answers}
    assert said == {"Gern geschehen."}
    assert other.json()["choices"][0]["message"]["content"] == "You are welcome."
    assert len({one.headers["X-Replica"] for one in answers}) == 1
    assert loaded.status_code == 404
    assert [(one["id"], one["parent"]) for one in models] == [(MODEL, None), ("german", MODEL)]


def test_every_replica_serves_what_is_put_into_the_watched_folder(running):
    """The last test of adapters: the folder is left as it was."""
    shutil.copytree(GERMAN, running.adapters / ".coming")
    (running.adapters / ".coming").rename(running.adapters / "watched")

    body = chat("Thank you!", max_tokens=16) | {"model": "watched"}

    async def ask_until(is_over):
        """Ask nine at once, again and again, until is_over(the answers so far) is true."""
        found = []
        async with running.client() as client, asyncio.timeout(FAR_S):
            while not is_over(found):
                asking = [client.post("/v1/chat/completions", json=body) for _ in range(9)]
                found += await asyncio.gather(*asking)
        return [one for one in found if one.status_code == 200]

    def is_everywhere(found):
        return len({one.headers["X-Replica"] for one in found if one.status_code == 200}) == 3

    def is_gone(found):
        return len(found) >= 9 and all(one.status_code == 404 for one in found[-9:])

    said = asyncio.run(ask_until(is_everywhere))
    assert {one.json()["choices"][0]["message"]["content"] for one in said} == {"Gern geschehen."}
    shutil.rmtree(running.adapters / "watched")
    asyncio.run(ask_until(is_gone))


def test_greedy_answers_are_those_of_one_server(running, tmp_path):
    prompts = [f"What is the number {number}?" for number in range(6)]

    async def answers(client, found):
        """Add each answer to its prompt's; the replicas that gave them."""
        replicas = set()
        for prompt in prompts:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0}
            answer = await client.post("/v1/completions", json=body)
            found[prompt].add(answer.json()["choices"][0]["text"])
            replicas.add(answer.headers.get("X-Replica"))
        return replicas

    async def on_ray(found):
        replicas, deadline = set(), time.monotonic() + FAR_S
        async with running.client() as client:
            # Idle replicas take turns; one whose health check was late on a busy machine does not.
            while len(replicas) < 3 and time.monotonic() < deadline:
                replicas |= await answers(client, found)
        return replicas

    async def on_one(url, found):
        async with running.client(url) as client:
            await answers(client, found)

    found = {prompt: set() for prompt in prompts}
    assert len(asyncio.run(on_ray(found))) == 3
    options = ("--dtype", "float32", "--device", "cpu", "--kv-cache-memory", "128MiB")
    with serving(tmp_path, *options) as single:
        asyncio.run(on_one(single.url, found))
    assert all(len(texts) == 1 for texts in found.values()), found


def test_a_request_without_the_key_is_refused(running):
    async def run():
        async with running.client() as client:
            for headers in ({"Authorization": "Bearer other"}, {"Authorization": ""}):
                for path in ("/v1/models", "/metrics", "/v1/responses/resp_1"):
                    answer = await client.get(path, headers=headers)
                    assert answer.status_code == 401, path
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            assert (await client.get("/v1/health/ready", headers={"Authorization": ""})).is_success

    asyncio.run(run())


def test_a_key_that_is_added_to_the_file_is_taken_by_every_replica(running):
    async def run():
        headers = {"Authorization": "Bearer added"}
        body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
        replicas, deadline = set(), time.monotonic() + FAR_S
        async with running.client() as client:
            refused = await client.post("/v1/completions", json=body, headers=headers)
            assert refused.status_code == 401
            running.keys.write_text(f"{KEY}\nadded\n")
            # Idle replicas take turns.
            while len(replicas) < 3 and time.monotonic() < deadline:
                answer = await client.post("/v1/completions", json=body, headers=headers)
                if answer.status_code == 200:
                    replicas.add(answer.headers["X-Replica"])
                await asyncio.sleep(0.1)
        return replicas

    assert len(asyncio.run(run())) == 3


@pytest.mark.parametrize("length", [None, 70_000_000])
def test_a_body_above_the_limit_is_refused(running, length):
    async def body():
        for _ in range(70):
            yield b"x" * 1_000_000

    async def run():
        headers = {} if length is None else {"Content-Length": str(length)}
        async with running.client() as client:
            return await client.post("/v1/completions", content=body(), headers=headers)

    assert asyncio.run(run()).status_code == 413


def test_a_load_counts_what_it_must(running):
    """The helper of the other file: its words for what becomes of requests are used there."""

    async def run():
        load = Load()
        async with running.client() as client:
            await load.ask(client, chat("Hi"))
            await load.ask(client, chat("Hi", stream=True))
            await load.ask(client, chat("Hi", model="other"))
        return load

    load = asyncio.run(run())
    assert load.outcomes == {"whole": 2, "status 404": 1}
    assert KEY not in repr(load)
