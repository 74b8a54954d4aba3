"""Answers that are not streamed: the bound on their log-probabilities, and their memory."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from types import SimpleNamespace

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

from vlmserve.models.batch import TokenLogprobs
from vlmserve.router.messages import AddRequest, SequenceOutput
from vlmserve.server.api.whole_answer import made_of
from vlmserve.server.generation.answer_stream import AnswerStream
from vlmserve.server.generation.completion import Completion
from vlmserve.server.generation.events import End, Finish, PromptLogprobs, TextDelta, Usage
from vlmserve.server.generation.token_text import PromptCandidate, TokenReader, TokenText

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMIT = 2 * 10 * 21
TOKENIZER = meta_like_tokenizer()
TURN = {"role": "user", "content": "What is in this image?"}
CHAT_BODY = {"model": MODEL, "messages": [TURN], "n": 2, "logprobs": True, "top_logprobs": 20}
TEXT_BODY = {"model": MODEL, "prompt": ["What is", "a"], "logprobs": 20}


def answered(request):
    """Both choices end at once; what counts is what the engine was asked."""
    (output,) = tokens_one_by_one(TOKENIZER, "", "stop")
    for choice in range(len(request.answer_ids)):
        yield type(output)(request_id=str(choice), token_ids=[128009], finish_reason="stop")


def asked(checkpoint, path, **fields):
    """The response to one request, and the max_tokens that the engine got."""

    async def run():
        engine = ScriptedEngine(answered)
        async with client_of(checkpoint, engine, max_answer_logprobs=LIMIT) as client:
            response = await client.post(path, json=fields)
        return response, [request.max_tokens for request in engine.requests]

    return asyncio.run(run())


@pytest.mark.parametrize(("path", "body"), [(CHAT, CHAT_BODY), (COMPLETIONS, TEXT_BODY)])
def test_row_57_the_bound_on_log_probabilities_of_a_whole_answer_is_exact(checkpoint, path, body):
    """One request of 64 answers of 7,500 tokens with 20 candidates took a worker to 3.6 GB."""
    response, rooms = asked(checkpoint, path, **body, max_tokens=10)
    assert response.status_code == 200, response.text
    assert set(rooms) == {10}
    response, rooms = asked(checkpoint, path, **body, max_tokens=11)
    error = error_of(response, 400)
    assert error["param"] == "max_tokens"
    assert "462 log-probabilities" in error["message"]
    assert "stream it, or ask for fewer" in error["message"]
    assert rooms == []


def test_row_57_a_streamed_answer_has_no_such_bound(checkpoint):
    response, rooms = asked(checkpoint, CHAT, **CHAT_BODY, max_tokens=1_000, stream=True)
    assert (response.status_code, rooms) == (200, [1_000])


def test_row_57_without_max_tokens_an_answer_may_have_what_the_bound_leaves(checkpoint):
    response, rooms = asked(checkpoint, CHAT, **CHAT_BODY)
    assert (response.status_code, rooms) == (200, [10])


def test_row_57_an_answer_without_log_probabilities_has_no_such_bound(checkpoint):
    body = {"model": MODEL, "messages": [TURN], "max_tokens": 1_000}
    response, rooms = asked(checkpoint, CHAT, **body)
    assert (response.status_code, rooms) == (200, [1_000])


class Counted:
    """A log that counts its entries."""

    def __init__(self):
        self.num_entries = 0

    def add(self, entries):
        self.num_entries += len(entries)

    def as_json(self):
        raise AssertionError("nothing is made into JSON here")


def test_row_57_tokens_without_text_wait_in_the_log_too():
    """Special tokens give no event: their entries were kept as objects until the answer's end."""
    events, log = [], Counted()
    request = AddRequest(request_id="r", prompt_token_ids=[1], max_tokens=100)
    checkpoint_parts = SimpleNamespace(
        tokenizer=TOKENIZER, special_ids={128009}, end_of_message_id=None, python_tag_id=None
    )
    reader = TokenReader(TOKENIZER)
    stream = AnswerStream(request, (), checkpoint_parts, reader, log=log)
    logprobs = TokenLogprobs(logprob=-1.0, top_token_ids=[], top_logprobs=[])
    for number in range(100):
        reason = "length" if number == 99 else None
        output = SequenceOutput(
            request_id="r", token_ids=[128009], finish_reason=reason, logprobs=[logprobs]
        )
        events += stream.take(output)
    assert log.num_entries == 100
    assert [type(event) for event in events] == [Finish]
    assert events[0].logprobs == ()


def test_many_entries_of_prompts_are_written_beside_the_event_loop():
    """Their JSON used to hold up everybody's streams."""
    threads = []

    def make():
        threads.append(threading.current_thread())

    async def run():
        entry = (PromptCandidate(1, "a", -1.0, 1),) * 21
        for count in (10, 1_000):
            prompt = PromptLogprobs(0, (TokenText("a", b"a"),) * count, (entry,) * count)
            await made_of(Completion((), Usage(1, 1), (prompt,)), make)

    asyncio.run(run())
    few, many = threads
    assert few is threading.main_thread()
    assert many is not few


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_row_57_a_whole_answer_keeps_its_text_and_no_events(count):
    """Each token's event was kept until the end: some 170 bytes for four characters."""

    async def events():
        for number in range(count):
            yield TextDelta("wörd", choice=number % 2)
        for choice in range(2):
            yield Finish("stop", None, Usage(1, count // 2), choice=choice)
        yield End(Usage(1, count))

    async def run() -> None:
        tracemalloc.start()
        try:
            completion = await Completion.collect(events())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert [len(one.text) for one in completion.answers] == [2 * count] * 2
        # While it grows, and once more as the text is taken out of the buffer.
        assert peak < 50_000 + 2.5 * 4 * 4 * count

    asyncio.run(run())
