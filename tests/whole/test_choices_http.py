"""Several answers, priorities and timeouts as a client meets them."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from support.http_side import (
    CLIENT_DEADLINE_S,
    MODEL,
    OneTileImages,
    ScriptedEngine,
    client_of,
    frames_of,
)
from support.polling import until

from vlmserve.router.messages import SequenceOutput
from vlmserve.server.errors import DeadlineError
from vlmserve.server.generation.generator import Generator
from vlmserve.server.generation.request import GenerationRequest, sampling_params
from vlmserve.server.prompts.conversation import Message, TextPart
from vlmserve.server.prompts.processor import Processor
from vlmserve.server.structured_output.compile_checks import GrammarChecks
from vlmserve.server.telemetry.metrics import Metrics

CHAT = "/v1/chat/completions"
STACK = "/inference/chat_completion"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What is this?"}]}
LIVE_MODEL = "vlmserve-tiny-vision"


def post(checkpoint, body, script, *, path=CHAT, **settings):
    """One POST to a worker with a scripted engine: the response and the engine."""
    engine = ScriptedEngine(script)

    async def run():
        async with client_of(checkpoint, engine, **settings) as client:
            return await client.post(path, json=body)

    return asyncio.run(run()), engine


def output(choice, token_ids, reason=None):
    return SequenceOutput(request_id=str(choice), token_ids=token_ids, finish_reason=reason)


def three_answers(request):
    """ "What", " is" and "in" in any order of steps; the middle one is the longest."""
    assert len(request.choice_ids) == 2
    return [
        output(1, [374]),
        output(0, [3923, 128009], "stop"),
        output(2, [304]),
        output(2, [304], "length"),
        output(1, [374, 374]),
        output(1, [128009], "stop"),
    ]


def test_answers_come_in_order_and_usage_counts_the_prompt_once(checkpoint):
    response, _ = post(checkpoint, BODY | {"n": 3}, three_answers)
    answer = response.json()
    assert response.status_code == 200, answer
    told = [(one["index"], one["message"]["content"]) for one in answer["choices"]]
    assert told == [(0, "What"), (1, " is is is"), (2, " in in")]
    assert [one["finish_reason"] for one in answer["choices"]] == ["stop", "stop", "length"]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 2 + 4 + 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8


def test_streamed_choices_joined_are_the_plain_answers(checkpoint):
    body = BODY | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    response, _ = post(checkpoint, body, three_answers)
    *frames, done = frames_of(response)
    chunks = [json.loads(frame) for frame in frames]
    assert done == "[DONE]"
    assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2]
    assert all(c["choices"][0]["delta"]["role"] == "assistant" for c in chunks[:3])
    texts, reasons = ["", "", ""], {}
    for chunk in chunks[3:-1]:
        (choice,) = chunk["choices"]
        assert choice["index"] not in reasons, "a chunk after the last one"
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == ["What", " is is is", " in in"]
    assert reasons == {0: "stop", 1: "stop", 2: "length"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_a_stop_string_ends_its_choice_alone(checkpoint):
    def script(request):
        return [
            output(0, [3923, 374]),
            output(1, [3923]),
            output(1, [304, 304]),
            output(1, [128009], "stop"),
        ]

    response, engine = post(checkpoint, BODY | {"n": 2, "stop": " is"}, script)
    choices = response.json()["choices"]
    assert [one["message"]["content"] for one in choices] == ["What", "What in in"]
    assert [one["stop_reason"] for one in choices] == [" is", None]
    assert engine.aborted == [engine.requests[0].request_id]


@pytest.mark.parametrize(
    "field", [{"n": 0}, {"n": 129}, {"priority": 2**31}, {"priority": "x"}, {"timeout_s": 0}]
)
def test_what_is_out_of_range_is_refused_by_its_name(checkpoint, field):
    response, engine = post(checkpoint, BODY | field, three_answers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(field))
    assert engine.requests == []


def test_more_answers_than_run_at_once_are_refused(checkpoint):
    response, engine = post(checkpoint, BODY | {"n": 65}, three_answers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
    assert "--max-num-seqs" in response.json()["error"]["message"]
    assert engine.requests == []


def test_the_priority_goes_to_the_engine(checkpoint):
    _, engine = post(checkpoint, BODY | {"priority": -7}, lambda _: [output(0, [128009], "stop")])
    assert engine.requests[0].priority == -7


def never(request):
    """A token, then a silence that outlasts any test."""
    return [output(0, [3923]), 600.0]


@pytest.mark.parametrize("path", [CHAT, STACK])
@pytest.mark.parametrize("by_server", [True, False])
def test_a_request_past_its_time_is_a_504_and_aborted(checkpoint, path, by_server):
    if path == STACK and not by_server:
        return  # Llama Stack's requests have no such field
    settings = {"max_request_time_s": 0.2} if by_server else {}
    body = BODY if by_server else BODY | {"timeout_s": 0.2}
    response, engine = post(checkpoint, body, never, path=path, **settings)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    assert "--max-request-time" in error["message"]
    assert engine.aborted == [engine.requests[0].request_id]


def test_a_stream_past_its_time_ends_with_an_error_frame(checkpoint):
    body = BODY | {"timeout_s": 0.4, "stream": True}
    response, engine = post(checkpoint, body, never)
    *_, text, error, done = frames_of(response)
    assert json.loads(text)["choices"][0]["delta"] == {"content": "What"}
    assert json.loads(error)["error"]["code"] == "timeout"
    assert done == "[DONE]"
    assert engine.aborted == [engine.requests[0].request_id]


def test_a_request_whose_reader_has_stopped_reading_is_freed_in_time(checkpoint):
    """It used to run on in the engine, as only a wait for the engine ended at the deadline."""

    def script(request):
        return [output(0, [374]) for _ in range(9)]

    async def scenario():
        engine = ScriptedEngine(script)
        processor = Processor.from_folder(checkpoint, "front")
        checks = GrammarChecks(checkpoint)
        parts = (processor, OneTileImages(), engine, Metrics(8), 30.0, 0.2)
        generator = Generator(*parts, grammar_checks=checks)
        turn = Message("user", (TextPart("What?"),))
        wanted = GenerationRequest(messages=(turn,), sampling=sampling_params(0, None, None, 1))
        prepared = await generator.prepare(wanted)
        async with (
            asyncio.timeout(CLIENT_DEADLINE_S),
            contextlib.aclosing(generator.stream(prepared)) as events,
        ):
            await anext(events)
            await until(lambda: engine.aborted)
            with pytest.raises(DeadlineError):
                await anext(events)
        assert engine.aborted == prepared.answer_ids

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_time_spent_on_images_counts_and_the_loss_is_counted(checkpoint, stream):
    """A request that was too late for the engine used to be in no figure."""

    class SlowImages(OneTileImages):
        was_cancelled = False

        async def load(self, images, deadline=None):
            try:
                await asyncio.Event().wait()
            finally:
                self.was_cancelled = True

    image = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [image]}], "timeout_s": 0.2}
    engine, images = ScriptedEngine(never), SlowImages()

    async def scenario():
        async with client_of(checkpoint, engine, images=images) as client:
            response = await client.post(CHAT, json=body | {"stream": stream})
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
            figures = (await client.get("/metrics")).text
            assert "request_failure_total 1.0" in figures
            assert 'request_finish_total{finished_reason="error"} 1.0' in figures

    asyncio.run(scenario())
    assert images.was_cancelled
    assert engine.requests == []


def test_answers_of_the_real_server_share_one_computed_prompt(server, sdk, draw_picture, wait_for):
    picture = draw_picture(4242, num_shapes=2)
    encoded = server.metric("vlmserve_images_encoded_total")
    call = {
        "model": LIVE_MODEL,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture.url}},
                    {"type": "text", "text": "What is in this image?"},
                ],
            }
        ],
        "max_tokens": 48,
    }
    greedy = sdk.chat.completions.create(**call, temperature=0, n=4)
    assert len({one.message.content for one in greedy.choices}) == 1
    drawn = sdk.chat.completions.create(**call, temperature=2, seed=3, n=5)
    assert len({one.message.content for one in drawn.choices}) > 1
    first = sdk.chat.completions.create(**call, temperature=2, seed=3)
    assert first.choices[0].message.content == drawn.choices[0].message.content
    assert wait_for(lambda: server.metric("vlmserve_images_encoded_total") == encoded + 1)
