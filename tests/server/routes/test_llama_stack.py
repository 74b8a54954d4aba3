"""Llama Stack's chat completion on all its paths, against a running server."""

import asyncio
import json
from pathlib import Path

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)
from support.invariants import STACK_ROUTES, STACK_SPELLINGS

from vlmserve.router.errors import EngineDeadError
from vlmserve.server.routes.llama_stack import ROUTES

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENIZER = meta_like_tokenizer()
OLD = ["/inference/chat_completion", "/alpha/inference/chat-completion"]
NEW = ["/v1/inference/chat-completion"]
PREFIXES = ["", "/ls", "/experimental/ls"]
ANSWER = "This image shows a böardwalk 🐻"
BODY = {"model_id": MODEL, "messages": [{"role": "user", "content": "What is in this image?"}]}


def says(text, finish_reason="stop", end=128009):
    return lambda request: list(tokens_one_by_one(TOKENIZER, text, finish_reason, end))


def post_all(checkpoint, bodies, script=None, *, headers=None):
    """POST each (path, body); gives the answers and the engine."""

    async def run():
        engine = ScriptedEngine(script or says(ANSWER))
        async with client_of(checkpoint, engine) as client:
            answers = [
                await client.post(path, content=json.dumps(body), headers=headers)
                for path, body in bodies
            ]
        return answers, engine

    return asyncio.run(run())


def post(checkpoint, path, body, script=None, **options):
    (answer,), _ = post_all(checkpoint, [(path, body)], script, **options)
    return answer


def events_of(response):
    """The events of a stream, checked to be `data:` frames and nothing else."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = response.text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith("data: {") for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_the_documented_request_gets_the_documented_answer(checkpoint):
    body = json.loads((DATA / "llama_stack.request.json").read_text())
    sample = json.loads((DATA / "llama_stack.response.json").read_text())
    bodies = [(prefix + path, body) for prefix in PREFIXES for path in OLD]
    answers, engine = post_all(checkpoint, bodies)
    for answer in answers:
        assert answer.status_code == 200
        expected = sample["completion_message"] | {"content": ANSWER}
        assert answer.text == json.dumps(
            {"completion_message": expected, "logprobs": None},
            ensure_ascii=False,
            separators=(",", ":"),
        )
    assert len(engine.requests[0].images) == 1
    assert engine.requests[0].sampling.is_greedy


def test_the_new_paths_always_carry_tool_calls(checkpoint):
    answers, _ = post_all(checkpoint, [(prefix + NEW[0], BODY) for prefix in PREFIXES])
    for answer in answers:
        assert list(answer.json()["completion_message"].items()) == [
            ("role", "assistant"),
            ("content", ANSWER),
            ("stop_reason", "end_of_turn"),
            ("tool_calls", []),
        ]


def test_every_prefix_has_the_handlers_of_the_others():
    """So a test of some of the nine paths, `STACK_SPELLINGS`, is a test of all."""
    handlers = {one.path: one.handler for one in ROUTES.endpoints}
    assert set(STACK_ROUTES) == {prefix + path for prefix in PREFIXES for path in OLD + NEW}
    for prefix in PREFIXES:
        assert {handlers[prefix + path] for path in OLD} == {handlers[OLD[0]]}
        assert {handlers[prefix + path] for path in NEW} == {handlers[NEW[0]]}
    assert {handlers[path] for path in STACK_SPELLINGS} == {handlers[OLD[0]], handlers[NEW[0]]}


@pytest.mark.parametrize("path", OLD + NEW)
def test_a_stream_is_start_progress_complete_and_never_done(checkpoint, path):
    response = post(checkpoint, "/ls" + path, BODY | {"stream": True})
    events = [event["event"] for event in events_of(response)]
    assert "[DONE]" not in response.text
    assert '"error"' not in response.text
    assert [event["event_type"] for event in events] == (
        ["start"] + ["progress"] * (len(events) - 2) + ["complete"]
    )
    assert all(
        list(event) == ["event_type", "delta", "logprobs", "stop_reason"] for event in events
    )
    deltas = [event["delta"] for event in events]
    if path in NEW:
        assert all(list(delta) == ["type", "text"] for delta in deltas)
        deltas = [delta["text"] for delta in deltas]
    assert (deltas[0], deltas[-1]) == ("", "")
    assert "".join(deltas) == ANSWER
    stops = [event["stop_reason"] for event in events]
    assert stops == [None] * (len(events) - 1) + ["end_of_turn"]


@pytest.mark.parametrize(
    ("script", "stop_reason"),
    [
        (says("What"), "end_of_turn"),
        (says("What", end=128008), "end_of_message"),
        (says("What", "length"), "out_of_tokens"),
    ],
)
def test_the_stop_reason_tells_how_the_answer_ended(checkpoint, script, stop_reason):
    plain = post(checkpoint, OLD[0], BODY, script).json()
    assert plain["completion_message"]["stop_reason"] == stop_reason
    streamed = events_of(post(checkpoint, OLD[0], BODY | {"stream": True}, script))
    assert streamed[-1]["event"]["stop_reason"] == stop_reason


def test_only_stream_decides_whatever_the_client_accepts(checkpoint):
    headers = {"Accept": "text/event-stream"}
    response = post(checkpoint, NEW[0], BODY, headers=headers)
    assert response.headers["content-type"] == "application/json"


def test_an_error_in_the_middle_is_the_last_frame(checkpoint):
    def script(request):
        yield from tokens_one_by_one(TOKENIZER, "What", None)
        yield EngineDeadError("gone")

    for path in OLD + NEW:
        response = post(checkpoint, path, BODY | {"stream": True}, script)
        *events, error = events_of(response)
        assert list(error) == ["error"]
        assert [event["event"]["event_type"] for event in events] == ["start", "progress"]


def test_either_model_key_is_taken_on_every_path(checkpoint):
    messages = {"messages": BODY["messages"]}
    bodies = [
        (path, messages | {key: MODEL}) for path in OLD + NEW for key in ("model", "model_id")
    ]
    answers, _ = post_all(checkpoint, bodies)
    assert {answer.status_code for answer in answers} == {200}


def test_validation_errors_are_400_in_the_common_form(checkpoint):
    bodies = [(prefix + path, BODY | {"stream": "a"}) for prefix in PREFIXES for path in OLD + NEW]
    answers, engine = post_all(checkpoint, bodies)
    for answer in answers:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "stream"
    assert engine.requests == []


def test_models_are_listed_and_retrieved_under_the_prefixes_in_llama_stacks_form(checkpoint):
    async def run():
        engine = ScriptedEngine(says(ANSWER), max_model_len=512)
        async with client_of(checkpoint, engine, served_model_names=[MODEL, "other"]) as client:
            return [
                await client.get(f"{prefix}/v1/models{name}")
                for prefix in ("/ls", "/experimental/ls")
                for name in ("", f"/{MODEL}", f"/{MODEL.replace('/', '%2F')}", "/no-such-model")
            ]

    answers = asyncio.run(run())
    for listed, found, quoted, missing in (answers[:4], answers[4:]):
        first, second = listed.json()["data"]
        assert list(first.items()) == [
            ("identifier", MODEL),
            ("provider_resource_id", MODEL),
            ("provider_id", "vlmserve"),
            ("type", "model"),
            ("metadata", {"max_model_len": 512}),
            ("model_type", "llm"),
        ]
        assert second == first | {"identifier": "other"}
        assert found.json() == quoted.json() == first
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("prefix", ["", "/ls", "/experimental/ls"])
@pytest.mark.parametrize("path", ["/models", "/alpha/models"])
def test_clients_before_0_1_list_models_and_ask_for_one(checkpoint, prefix, path):
    """They used to get a 404."""

    async def run():
        engine = ScriptedEngine(says(ANSWER), max_model_len=512)
        async with client_of(checkpoint, engine, served_model_names=[MODEL, "other"]) as client:
            ends = ("list", f"get?identifier={MODEL}", "get?identifier=none", "get")
            return [await client.get(f"{prefix}{path}/{end}") for end in ends]

    listed, found, missing, unnamed = asyncio.run(run())
    first, second = listed.json()
    assert (first["identifier"], second["identifier"]) == (MODEL, "other")
    assert first["llama_model"] == second["llama_model"] == MODEL
    assert first["metadata"] == {"max_model_len": 512}
    assert found.json() == first
    assert (missing.status_code, missing.json(), unnamed.json()) == (200, None, None)
