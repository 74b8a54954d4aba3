"""The real server as a subprocess: pictures in, right answers out, nothing lost."""

import asyncio
import json
import urllib.request
from dataclasses import dataclass

import httpx2
import numpy
import pytest

from vlmserve.models.bundled.dataset.questions import ask

MODEL = "vlmserve-tiny-vision"


def user_message(text, *urls, image_first=True):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    words = [{"type": "text", "text": text}]
    return {"role": "user", "content": images + words if image_first else words + images}


def post(server, body) -> bytes:
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read()


QUESTIONS = ["shape", "colour", "background", "count", "describe"]


@pytest.mark.parametrize("image_first", [True, False])
def test_answers_about_fresh_pictures_are_right(sdk, draw_picture, image_first):
    right, wrong = 0, []
    rng = numpy.random.default_rng(5 + image_first)
    for seed in range(12):
        picture = draw_picture(1000 + seed, num_shapes=1 + seed % 2)
        question = ask(picture.scene, QUESTIONS[seed % len(QUESTIONS)], rng)
        if question is None:
            continue
        answer = sdk.chat.completions.create(
            model=MODEL,
            messages=[user_message(question.text, picture.url, image_first=image_first)],
            temperature=0,
            max_tokens=64,
        )
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        right += text == question.answer
        wrong += [(question.text, question.answer, text)] if text != question.answer else []
    assert right >= 11, wrong


def test_streamed_pieces_joined_equal_the_plain_answer(sdk, draw_picture):
    num_pieces = []
    for seed, text in enumerate(["What is in this image?", "Who are you?", "What can you do?"]):
        urls = [draw_picture(seed, 2).url] if seed == 0 else []
        call = {
            "model": MODEL,
            "messages": [user_message(text, *urls)],
            "temperature": 0,
            "max_tokens": 64,
        }
        plain = sdk.chat.completions.create(**call)
        chunks = list(
            sdk.chat.completions.create(**call, stream=True, stream_options={"include_usage": True})
        )
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert plain.choices[0].message.content
        assert "".join(pieces) == plain.choices[0].message.content
        num_pieces.append(len([piece for piece in pieces if piece]))
        assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens == plain.usage.prompt_tokens
    # a client that waits for a core may get one answer whole
    assert max(num_pieces) > 1


def test_raw_http_answers_and_streams_the_same_text(server, draw_picture):
    body = {
        "model": MODEL,
        "messages": [user_message("What is in this image?", draw_picture(77).url)],
        "temperature": 0,
        "max_tokens": 64,
    }
    plain = json.loads(post(server, body))
    frames = post(server, {**body, "stream": True}).decode().split("\n\n")
    data = [f.removeprefix("data: ") for f in frames if f.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(frame) for frame in data[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert text == plain["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_image_counts_as_one_prompt_token(server, draw_picture):
    def prompt_tokens(*urls):
        body = {"model": MODEL, "messages": [user_message("What is it?", *urls)], "max_tokens": 1}
        return json.loads(post(server, body))["usage"]["prompt_tokens"]

    url = draw_picture(3).url
    assert prompt_tokens(url) == prompt_tokens() + 1
    assert prompt_tokens(url, url) == prompt_tokens() + 2


@dataclass
class Job:
    """One request of the crowd: its body, and whether its client leaves midway."""

    body: dict
    is_cancelled: bool


def crowd(draw_picture, size: int) -> list[Job]:
    """Text-only, one-image and two-image requests in turn, every third one cancelled midway."""
    jobs = []
    for index in range(size):
        num_images = (index // 3) % 3
        urls = [draw_picture(2000 + 2 * index + i, 1 + i).url for i in range(num_images)]
        text = ["What is in this image?", "Who are you?", "How many shapes are there?"][index % 3]
        body = {
            "model": MODEL,
            "messages": [user_message(text, *urls)],
            "temperature": 0,
            # Long enough to be cut midway: the end of the turn does not stop a cancelled one.
            "max_tokens": 400 if index % 3 == 2 else 40,
            "ignore_eos": index % 3 == 2,
            "stream": True,
        }
        jobs.append(Job(body, index % 3 == 2))
    return jobs


async def stream_text(client, url, job) -> str | None:
    """The streamed text; None where the client left after three pieces."""
    pieces, done = [], False
    async with client.stream("POST", url, json=job.body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                pieces.append(chunk["choices"][0]["delta"].get("content") or "")
            if job.is_cancelled and len(pieces) > 3:
                return None
    assert done
    return "".join(pieces)


async def ask_all(server, jobs, at_once: bool) -> list[str | None]:
    url = f"{server.url}/v1/chat/completions"
    limits = httpx2.Limits(max_connections=len(jobs))
    async with httpx2.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
        if at_once:
            return list(await asyncio.gather(*(stream_text(client, url, job) for job in jobs)))
        return [await stream_text(client, url, job) for job in jobs]


def test_64_requests_at_once_each_get_the_answer_they_get_alone(server, draw_picture, wait_for):
    jobs = crowd(draw_picture, 64)
    together = asyncio.run(ask_all(server, jobs, at_once=True))
    staying = [job for job in jobs if not job.is_cancelled]
    alone = asyncio.run(ask_all(server, staying, at_once=False))
    assert [text for text, job in zip(together, jobs, strict=True) if not job.is_cancelled] == alone
    assert together.count(None) == sum(job.is_cancelled for job in jobs)
    # The last report may be of a moment at which the last request waited for its picture.
    assert wait_for(lambda: server.metric("num_requests_waiting") == 0)
    assert wait_for(lambda: server.metric("vlmserve_text_blocks_used") == 0)
    assert server.metric("vlmserve_image_blocks_used") == 0
    assert server.metric("num_requests_running") == 0
