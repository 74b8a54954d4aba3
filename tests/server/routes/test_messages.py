"""POST /v1/messages and its count of tokens against a running server with a scripted engine."""

import asyncio
import base64
import json

import msgspec
import pytest
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
    write_checkpoint,
)
from support.tool_template import TOOL_TEMPLATE

from vlmserve.router.errors import EngineDeadError, QueueFullError
from vlmserve.server.schemas.anthropic.requests import MessagesRequest, messages_generation

TOKENIZER = meta_like_tokenizer()
MESSAGES = "/v1/messages"
ANSWER = "This image shows a böardwalk 🐻 in a field."
CALL = '{"name": "get_weather", "parameters": {"city": "Zürich"}}'
HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
QUESTION = {"role": "user", "content": "What is in this image?"}
BODY = {"model": MODEL, "max_tokens": 64, "messages": [QUESTION]}
TOOLS = [
    {
        "name": "get_weather",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"name": "get_time", "input_schema": {"type": "object"}, "type": "custom"},
]
PICTURE = {"type": "image", "source": {"type": "url", "url": "https://host/a.png"}}


@pytest.fixture(scope="module")
def tool_checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE)


def says(text, finish_reason="stop"):
    return lambda request: list(tokens_one_by_one(TOKENIZER, text, finish_reason))


def ask(checkpoint, body, script=None, *, path=MESSAGES, headers=None, **options):
    """The response to one POST, and the requests that reached the engine."""

    async def run():
        engine = ScriptedEngine(script or says(ANSWER))
        async with client_of(checkpoint, engine, **options) as client:
            return await client.post(path, json=body, headers=headers), engine.requests

    return asyncio.run(run())


def events_of(response):
    """The contents of all frames, each of which is named by its content's type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for frame in response.text.split("\n\n"):
        lines = [line for line in frame.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        name, data = lines
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        events.append(content)
    return events


def prompt_of(request):
    return TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)


def test_an_answer_has_anthropic_s_shape(checkpoint):
    response, requests = ask(checkpoint, BODY)
    answer = response.json()
    assert response.status_code == 200
    assert answer["id"].startswith("msg_")
    assert answer["content"] == [{"type": "text", "text": ANSWER, "citations": None}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"]["input_tokens"] == len(requests[0].prompt_token_ids)
    assert answer["usage"]["output_tokens"] > 0


def test_a_turn_without_blocks_is_an_empty_one(checkpoint):
    """It was a 500: the conversation had no message."""
    turns = [
        ask(checkpoint, BODY | {"messages": [{"role": "user", "content": content}]})
        for content in ([], "")
    ]
    assert [response.status_code for response, _ in turns] == [200, 200]
    prompts = [prompt_of(requests[0]) for _, requests in turns]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"output_config": {"format": {"schema": {}}}}, "output_config.format.type"),
        ({"system": [{"text": "Be short."}]}, "system[0].type"),
    ],
)
def test_a_part_without_its_type_is_a_400(checkpoint, fields, missing):
    response, _ = ask(checkpoint, BODY | fields)
    assert response.status_code == 400
    assert missing in response.json()["error"]["message"]


def test_streamed_events_joined_are_the_plain_answer(checkpoint):
    response, requests = ask(checkpoint, BODY | {"stream": True})
    first, *between, delta, last = events_of(response)
    assert first["type"] == "message_start"
    assert first["message"]["content"] == []
    assert first["message"]["usage"]["input_tokens"] == len(requests[0].prompt_token_ids)
    assert between[0]["type"] == "content_block_start"
    assert between[-1] == {"type": "content_block_stop", "index": 0}
    pieces = [event["delta"]["text"] for event in between[1:-1]]
    assert "".join(pieces) == ANSWER
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] > 0
    assert last == {"type": "message_stop"}


@pytest.mark.parametrize(
    "source",
    [
        {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"x").decode()},
        {"type": "url", "url": "https://host/a.png"},
    ],
)
def test_a_picture_reaches_the_engine(checkpoint, source):
    images = OneTileImages()
    parts = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    body = BODY | {"messages": [{"role": "user", "content": parts}]}
    response, requests = ask(checkpoint, body, images=images)
    assert response.status_code == 200
    assert len(requests[0].images) == 1
    expected = source.get("url") or f"data:image/png;base64,{source['data']}"
    assert [image.url for image in images.requests] == [expected]


@pytest.mark.parametrize("system", ["You are a helpful assistant.", [
    {"type": "text", "text": "You are a ", "cache_control": {"type": "ephemeral"}},
    {"type": "text", "text": "helpful assistant."},
]])  # fmt: skip
def test_a_system_prompt_is_a_text_or_blocks(checkpoint, system):
    _, requests = ask(checkpoint, BODY | {"system": system})
    assert "You are a helpful assistant.<|eot_id|>" in prompt_of(requests[0])


def test_sampling_and_stops_reach_the_engine(checkpoint):
    body = BODY | {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["field"]}
    response, requests = ask(checkpoint, body)
    sampling = requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert requests[0].max_tokens == 64
    answer = response.json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "field")
    assert answer["content"][0]["text"] == ANSWER.partition("field")[0]


def test_top_p_0_is_greedy(checkpoint):
    _, requests = ask(checkpoint, BODY | {"top_p": 0})
    assert requests[0].sampling.temperature == 0


def test_an_answer_that_max_tokens_cuts_is_named_so(checkpoint):
    response, _ = ask(checkpoint, BODY, says("What is", "length"))
    assert response.json()["stop_reason"] == "max_tokens"


def test_calls_are_tool_use_blocks(tool_checkpoint):
    response, _ = ask(tool_checkpoint, BODY | {"tools": TOOLS}, says(CALL))
    answer = response.json()
    [block] = answer["content"]
    assert answer["stop_reason"] == "tool_use"
    assert (block["type"], block["name"], block["input"]) == (
        "tool_use", "get_weather", {"city": "Zürich"},
    )  # fmt: skip


def test_streamed_calls_are_blocks_with_their_input_in_pieces(tool_checkpoint):
    script = says(f"I look.<|python_tag|>{CALL}")
    response, _ = ask(tool_checkpoint, BODY | {"tools": TOOLS, "stream": True}, script)
    events = events_of(response)
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [event["content_block"]["type"] for event in starts] == ["text", "tool_use"]
    assert [event["index"] for event in starts] == [0, 1]
    assert starts[1]["content_block"]["input"] == {}
    pieces = [
        event["delta"]["partial_json"]
        for event in events
        if event["type"] == "content_block_delta" and event["index"] == 1
    ]
    assert json.loads("".join(pieces)) == {"city": "Zürich"}
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert stops == [0, 1]


def test_results_become_messages_of_the_tool_in_their_order(tool_checkpoint):
    turns = [
        QUESTION,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hidden", "signature": "s"},
            {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "X"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [
                {"type": "text", "text": "It is hot."},
            ]},
            {"type": "text", "text": "And now?"},
        ]},
    ]  # fmt: skip
    response, requests = ask(tool_checkpoint, BODY | {"messages": turns, "tools": TOOLS})
    assert response.status_code == 200, response.text
    prompt = prompt_of(requests[0])
    assert "hidden" not in prompt
    assert prompt.index("It is hot.") < prompt.index("And now?")
    # The published template would drop a text beside a call: Meta's format keeps it.
    turns[1]["content"].append({"type": "text", "text": "I look."})
    response, requests = ask(tool_checkpoint, BODY | {"messages": turns, "tools": TOOLS})
    assert response.status_code == 200, response.text
    assert 'I look.\n{"name": "get_weather"' in prompt_of(requests[0])


@pytest.mark.parametrize(
    "content",
    ["This image", [{"type": "text", "text": "This "}, {"type": "text", "text": "image"}]],
)
def test_an_answer_that_the_client_begins_is_continued(checkpoint, content):
    """Such a prefill used to be a turn of its own, which the model answered."""
    body = BODY | {"messages": [QUESTION, {"role": "assistant", "content": content}]}
    response, requests = ask(checkpoint, body, says(" shows a field."))
    assert response.json()["content"][0]["text"] == " shows a field."
    assert prompt_of(requests[0]).endswith("assistant<|end_header_id|>\n\nThis image")
    conversation = {"model": MODEL, "messages": body["messages"]}
    count, _ = ask(checkpoint, conversation, path=f"{MESSAGES}/count_tokens")
    assert count.json()["input_tokens"] == len(requests[0].prompt_token_ids)


@pytest.mark.parametrize("content", ["", " ", [{"type": "thinking", "thinking": "hm"}]])
def test_an_answer_that_begins_with_nothing_is_not_continued(checkpoint, content):
    body = BODY | {"messages": [QUESTION, {"role": "assistant", "content": content}]}
    response, requests = ask(checkpoint, body)
    assert response.status_code == 200
    assert prompt_of(requests[0]).endswith("<|eot_id|>" + HEADER)


def test_a_picture_s_answer_is_continued(checkpoint):
    turns = [{"role": "user", "content": [PICTURE]}, {"role": "assistant", "content": "It is"}]
    response, requests = ask(checkpoint, BODY | {"messages": turns, "tools": TOOLS})
    assert response.status_code == 200, response.text
    assert prompt_of(requests[0]).endswith(HEADER + "It is")


def test_what_no_grammar_can_enforce_is_reported(checkpoint):
    """It was dropped from output_config without a word."""
    schema = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}, "": 1}
    response, _ = ask(checkpoint, BODY | form, says("[]"))
    names = response.headers["x-ignored-fields"]
    assert names == '"", output_config.format.schema.uniqueItems'


def test_a_result_of_no_call_is_refused_by_its_place(checkpoint):
    block = {"type": "tool_result", "tool_use_id": "none", "content": "x"}
    body = BODY | {"messages": [{"role": "user", "content": [block]}]}
    response, _ = ask(checkpoint, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "messages[0].content[0].tool_use_id"


@pytest.mark.parametrize(
    ("choice", "has_grammar", "has_tools"),
    [
        ({"type": "auto"}, False, True),
        ({"type": "none"}, False, False),
        ({"type": "any"}, True, True),
        ({"type": "tool", "name": "get_time"}, True, True),
    ],
)
def test_tool_choice_decides_what_the_answer_may_be(choice, has_grammar, has_tools):
    body = BODY | {"tools": TOOLS, "tool_choice": choice}
    generation = messages_generation(msgspec.convert(body, MessagesRequest))
    assert (generation.grammar is not None) is has_grammar
    assert bool(generation.tools) is has_tools


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_not_served_is_a_400_in_anthropic_s_form(checkpoint, fields, param):
    response, _ = ask(checkpoint, BODY | fields)
    body = response.json()
    assert response.status_code == 400
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert param in (body["error"]["param"] or body["error"]["message"])


def test_errors_have_anthropic_s_types(checkpoint):
    full, _ = ask(checkpoint, BODY, lambda request: [QueueFullError("full", retry_after_s=2.0)])
    assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
    assert full.headers["retry-after"] == "2"
    unknown, _ = ask(checkpoint, BODY | {"model": "other"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")


def test_a_stream_that_fails_ends_with_an_error_event(checkpoint):
    def script(request):
        return [*tokens_one_by_one(TOKENIZER, "What", None), EngineDeadError("gone")]

    response, _ = ask(checkpoint, BODY | {"stream": True}, script)
    *_, last = events_of(response)
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")


def test_count_tokens_is_the_usage_of_the_same_message(checkpoint):
    parts = [PICTURE, {"type": "text", "text": "What is in this image?"}]
    conversation = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    counted, _ = ask(checkpoint, conversation, path=f"{MESSAGES}/count_tokens")
    answered, _ = ask(checkpoint, BODY | conversation, images=OneTileImages())
    assert counted.json() == {"input_tokens": 17}
    assert answered.json()["usage"]["input_tokens"] == 17


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "secret"}, 200),
        ({"authorization": "Bearer secret"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": "secret", "authorization": "Bearer wrong"}, 401),
        ({}, 401),
    ],
)
def test_the_key_may_come_as_x_api_key(checkpoint, headers, status):
    response, _ = ask(checkpoint, BODY, headers=headers, api_keys=["secret"])
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["type"] == "authentication_error"
