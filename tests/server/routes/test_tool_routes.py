"""Tool calls over HTTP: scripted replies become calls, plain and streamed, on every API."""

import asyncio
import json

import msgspec
import openai
import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
    write_checkpoint,
)
from support.invariants import GENERATION_ROUTES
from support.tool_template import TOOL_TEMPLATE

from vlmserve.models.batch import TokenLogprobs
from vlmserve.router.messages import SequenceOutput

TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"
OLD = "/inference/chat_completion"
NEW = "/v1/inference/chat-completion"
EOM = 128008

QUESTION = {"role": "user", "content": "Is it hot?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
BODY = {"model": MODEL, "messages": [QUESTION], "tools": TOOLS}
STACK_TOOLS = [
    {"tool_name": "get_weather", "parameters": {"city": {"param_type": "string"}}},
    {"tool_name": "get_time", "parameters": {}},
]
STACK_BODY = {"model_id": MODEL, "messages": [QUESTION], "tools": STACK_TOOLS}

ARGUMENTS = '{"city": "Zürich"}'
JSON_REPLY = '{"name": "get_weather", "parameters": ' + ARGUMENTS + "}"
REPLIES = [
    (JSON_REPLY, None, [("get_weather", ARGUMENTS)]),
    (f'{JSON_REPLY}; {{"name": "get_time", "parameters": {{}}}}', None, [
        ("get_weather", ARGUMENTS), ("get_time", "{}"),
    ]),
    (f"I look: <function=get_weather>{ARGUMENTS}</function>", "I look: ", [
        ("get_weather", ARGUMENTS),
    ]),
    ('<|python_tag|>get_weather.call(city="Zürich")', None, [("get_weather", ARGUMENTS)]),
    (f"Hm.<|python_tag|>{JSON_REPLY}", "Hm.", [("get_weather", ARGUMENTS)]),
    ('{"name": "get_money", "parameters": {}}', '{"name": "get_money", "parameters": {}}', []),
    ("It is hot.", "It is hot.", []),
]  # fmt: skip


def says(*texts, finish_reason="stop", end=128009):
    """Answers one request after another with these texts, the last one again and again."""
    left = list(texts)

    def script(request):
        text = left.pop(0) if len(left) > 1 else left[0]
        return list(tokens_one_by_one(TOKENIZER, text, finish_reason, end))

    return script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), TOOL_TEMPLATE)


def serve(checkpoint, script, use):
    """Run `use(client, engine)` against a server and give what it gives."""

    async def run():
        engine = ScriptedEngine(script)
        async with client_of(checkpoint, engine) as client:
            return await use(client, engine)

    return asyncio.run(run())


def post(checkpoint, script, *bodies, path=CHAT):
    async def use(client, engine):
        answers = [await client.post(path, json=body) for body in bodies]
        return answers, engine

    return serve(checkpoint, script, use)


def frames_of(response):
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8", response.text
    frames = [part for part in response.text.split("\n\n") if part and not part.startswith(":")]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames if frame[6] == "{"]


def accumulated(deltas):
    """Content and calls from OpenAI's deltas, as their clients put them together."""
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content") or ""
        for part in delta.get("tool_calls", []):
            if part["index"] == len(calls):
                assert list(part) == ["index", "id", "type", "function"]
                assert part["function"]["arguments"] == ""
                calls.append({"id": part["id"], "type": part["type"], "function": part["function"]})
            else:
                assert list(part) == ["index", "function"]
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return content, calls


@pytest.mark.parametrize(("reply", "content", "calls"), REPLIES)
def test_an_answers_own_message_can_be_sent_back(checkpoint, reply, content, calls):
    """With several calls, or a text beside one, the published template fails or drops the text."""

    async def use(client, engine):
        answer = (await client.post(CHAT, json=BODY)).json()["choices"][0]["message"]
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "yes"}
            for call in answer["tool_calls"]
        ]
        turns = [QUESTION, answer, *results, {"role": "user", "content": "And now?"}]
        return await client.post(CHAT, json=BODY | {"messages": turns}), engine.requests

    response, requests = serve(checkpoint, says(reply, "It is hot."), use)
    assert response.status_code == 200, response.text
    prompt = TOKENIZER.decode(requests[1].prompt_token_ids, skip_special_tokens=False)
    assert (content or "").strip() in prompt
    for name, _ in calls:
        assert prompt.count(f'"name": "{name}", "parameters": {{') == 1


@pytest.mark.parametrize(("reply", "content", "calls"), REPLIES)
def test_a_reply_becomes_calls_plain_and_streamed(checkpoint, reply, content, calls):
    streaming = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    (plain, streamed), engine = post(checkpoint, says(reply), BODY, streaming)
    choice = plain.json()["choices"][0]
    message = choice["message"]
    assert list(message) == ["role", "content", "tool_calls"]
    assert message["content"] == content
    told = [
        (one["function"]["name"], one["function"]["arguments"]) for one in message["tool_calls"]
    ]
    assert told == calls
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    assert len({one["id"] for one in message["tool_calls"]}) == len(calls)
    assert all(one["id"].startswith("call_") for one in message["tool_calls"])

    *chunks, usage = frames_of(streamed)
    choices = [chunk["choices"][0] for chunk in chunks]
    text, streamed_calls = accumulated([one["delta"] for one in choices])
    assert text == (content or "")
    assert [
        (one["function"]["name"], one["function"]["arguments"]) for one in streamed_calls
    ] == calls
    assert [one["finish_reason"] for one in choices] == (
        [None] * (len(choices) - 1) + [choice["finish_reason"]]
    )
    assert usage["usage"] == plain.json()["usage"]
    assert engine.aborted == []


def test_without_tools_nothing_is_parsed_and_no_key_is_added(checkpoint):
    body = {"model": MODEL, "messages": [QUESTION]}
    (plain, none), engine = post(checkpoint, says(JSON_REPLY), body, BODY | {"tool_choice": "none"})
    assert plain.json()["choices"][0]["message"] == {"role": "assistant", "content": JSON_REPLY}
    message = none.json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": JSON_REPLY, "tool_calls": []}
    assert none.json()["choices"][0]["finish_reason"] == "stop"
    first, second = (request.prompt_token_ids for request in engine.requests)
    assert first == second


def test_the_openai_sdk_accumulates_our_deltas_into_the_plain_calls(checkpoint):
    reply = REPLIES[1][0]

    async def use(client, engine):
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        async with sdk:
            plain = await sdk.chat.completions.create(**BODY)
            async with sdk.chat.completions.stream(**BODY) as stream:
                events = [event.type async for event in stream]
                final = await stream.get_final_completion()
        return plain, final, events

    plain, final, events = serve(checkpoint, says(reply), use)
    expected = [call.function for call in plain.choices[0].message.tool_calls]
    found = [call.function for call in final.choices[0].message.tool_calls]
    assert [(one.name, one.arguments) for one in found] == [
        (one.name, one.arguments) for one in expected
    ]
    assert final.choices[0].finish_reason == plain.choices[0].finish_reason == "tool_calls"
    assert "tool_calls.function.arguments.done" in events


def test_a_round_trip_from_question_to_call_to_result_to_answer(checkpoint):
    async def use(client, engine):
        sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        async with sdk:
            messages = [QUESTION]
            first = await sdk.chat.completions.create(**BODY | {"messages": messages})
            (call,) = first.choices[0].message.tool_calls
            messages.append(first.choices[0].message.model_dump(exclude_none=True))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "30 °C"})
            second = await sdk.chat.completions.create(**BODY | {"messages": messages})
        return second, engine

    second, engine = serve(checkpoint, says(JSON_REPLY, "Yes, it is."), use)
    assert second.choices[0].message.content == "Yes, it is."
    assert second.choices[0].finish_reason == "stop"
    prompt = TOKENIZER.decode(engine.requests[1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith(
        "<|start_header_id|>assistant<|end_header_id|>\n\n" + JSON_REPLY + "<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n"
        '"30 °C"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    )
    # The second prompt begins with the first: cached blocks serve both.
    first_ids = engine.requests[0].prompt_token_ids
    assert engine.requests[1].prompt_token_ids[: len(first_ids)] == first_ids


def test_one_call_is_all_where_parallel_calls_are_refused(checkpoint):
    body = BODY | {"parallel_tool_calls": False}
    (plain, streamed), engine = post(checkpoint, says(REPLIES[1][0]), body, body | {"stream": True})
    choice = plain.json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["finish_reason"]) == ("get_weather", "tool_calls")
    assert plain.json()["usage"]["completion_tokens"] == len(
        TOKENIZER.encode(JSON_REPLY, add_special_tokens=False).ids
    )
    _, calls = accumulated([chunk["choices"][0]["delta"] for chunk in frames_of(streamed)])
    assert [one["function"]["arguments"] for one in calls] == [ARGUMENTS]
    assert engine.aborted == [request.request_id for request in engine.requests]


def test_each_choice_has_calls_of_its_own(checkpoint):
    def script(request):
        for choice, text in enumerate([JSON_REPLY, "No."]):
            for output in tokens_one_by_one(TOKENIZER, text):
                yield msgspec.structs.replace(output, request_id=str(choice))

    body = BODY | {"n": 2}
    (plain, streamed), _ = post(checkpoint, script, body, body | {"stream": True})
    first, second = plain.json()["choices"]
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert (first["message"]["content"], second["message"]["content"]) == (None, "No.")
    by_choice = {0: [], 1: []}
    for chunk in frames_of(streamed):
        by_choice[chunk["choices"][0]["index"]].append(chunk["choices"][0]["delta"])
    assert accumulated(by_choice[0])[1][0]["function"]["arguments"] == ARGUMENTS
    assert accumulated(by_choice[1]) == ("No.", [])


def test_a_call_cut_by_max_tokens_says_length_and_keeps_what_there_is(checkpoint):
    cut = JSON_REPLY[:-6]
    (plain,), _ = post(checkpoint, says(cut, finish_reason="length"), BODY)
    choice = plain.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])
    assert choice["message"]["content"] is None


def test_held_text_comes_out_at_a_stop_string(checkpoint):
    reply = '{"name": "get_weather" STOP'
    (plain,), _ = post(checkpoint, says(reply), BODY | {"stop": "STOP"})
    choice = plain.json()["choices"][0]
    assert choice["message"]["content"] == '{"name": "get_weather" '
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")


def test_a_held_start_of_a_stop_string_keeps_its_place_before_a_python_tag(checkpoint):
    reply = "Wait ST<|python_tag|>get_time()"
    (plain,), _ = post(checkpoint, says(reply), BODY | {"stop": "STOP"})
    message = plain.json()["choices"][0]["message"]
    assert message["content"] == "Wait ST"
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_time"]


def test_every_token_of_a_call_has_its_logprob(checkpoint):
    def script(request):
        for output in tokens_one_by_one(TOKENIZER, JSON_REPLY):
            logprobs = [
                TokenLogprobs(logprob=-0.5, top_token_ids=[], top_logprobs=[])
                for _ in output.token_ids
            ]
            yield msgspec.structs.replace(output, logprobs=logprobs)

    body = BODY | {"logprobs": True}
    (plain, streamed), _ = post(checkpoint, script, body, body | {"stream": True})
    entries = plain.json()["choices"][0]["logprobs"]["content"]
    assert len(entries) == plain.json()["usage"]["completion_tokens"]
    parts = [chunk["choices"][0]["logprobs"] for chunk in frames_of(streamed)]
    assert [one for part in parts if part for one in part["content"]] == entries
    stack = STACK_BODY | {"logprobs": {"top_k": 1}}
    (told,), _ = post(checkpoint, script, stack | {"stream": True}, path=NEW)
    events = [frame["event"]["logprobs"] for frame in frames_of(told)]
    assert sum(len(part) for part in events if part) == len(entries)


IMAGE = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
PICTURED = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}
LATER = [
    PICTURED,
    {"role": "assistant", "content": "A field."},
    {"role": "user", "content": "Hot?"},
]


@pytest.mark.parametrize("turns", [[PICTURED], LATER])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_tools_beside_a_picture_stand_in_the_system_message(checkpoint, turns, system):
    """Tools and pictures in one request used to be a 400, with advice that did not work."""
    body = BODY | {"messages": [{"role": "system", "content": system}][: bool(system)] + turns}
    (plain, streamed), engine = post(checkpoint, says(JSON_REPLY), body, body | {"stream": True})
    (call,) = plain.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert accumulated([one["choices"][0]["delta"] for one in frames_of(streamed)])[1]
    request = engine.requests[0]
    assert len(request.images) == len(request.spans) == 1
    prompt = TOKENIZER.decode(request.prompt_token_ids, skip_special_tokens=False)
    head, rest = prompt.split("<|eot_id|>", 1)
    assert head.count("<|start_header_id|>system") == 1
    assert '"name": "get_weather"' in head
    assert head.endswith(system)
    assert "user<|end_header_id|>\n\n<|image|>What is this?" in rest
    assert "get_weather" not in rest


def test_llama_stacks_tools_beside_a_picture_are_served(checkpoint):
    image = {"type": "image", "image": {"url": {"uri": "https://host/a.png"}}}
    body = STACK_BODY | {"messages": [{"role": "user", "content": [image]}]}
    for path in (OLD, NEW):
        (answer,), engine = post(checkpoint, says(JSON_REPLY), body, path=path)
        assert answer.status_code == 200
        assert answer.json()["completion_message"]["tool_calls"]
        assert len(engine.requests[0].images) == 1


@pytest.mark.parametrize("path", [OLD, NEW])
@pytest.mark.parametrize(("reply", "content", "calls"), REPLIES)
def test_llama_stack_tells_calls_plain(checkpoint, path, reply, content, calls):
    (answer,), _ = post(checkpoint, says(reply, end=EOM), STACK_BODY, path=path)
    message = answer.json()["completion_message"]
    assert list(message) == ["role", "content", "stop_reason", "tool_calls"]
    assert message["content"] == (content or "")
    assert message["stop_reason"] == "end_of_message"
    assert [list(call) for call in message["tool_calls"]] == [
        ["call_id", "tool_name", "arguments"] for _ in calls
    ]
    assert [(call["tool_name"], call["arguments"]) for call in message["tool_calls"]] == [
        (name, json.loads(arguments)) for name, arguments in calls
    ]


def test_llama_stack_streams_a_call_in_the_style_of_its_path(checkpoint):
    call = {"tool_name": "get_weather", "arguments": json.loads(ARGUMENTS)}
    for path in (OLD, NEW):
        (answer,), _ = post(checkpoint, says(JSON_REPLY), STACK_BODY | {"stream": True}, path=path)
        first, *events, last = [frame["event"] for frame in frames_of(answer)]
        assert (first["event_type"], last["event_type"]) == ("start", "complete")
        assert last["stop_reason"] == "end_of_turn"
        assert {event["event_type"] for event in events} == {"progress"}
        deltas = [event["delta"] for event in events]
        key, words = (
            ("tool_call", ["started", "in_progress", "succeeded"])
            if path == NEW
            else ("content", ["started", "in_progress", "success"])
        )
        keys = ["type", key, "parse_status"] if path == NEW else [key, "parse_status"]
        assert all(list(delta) == keys for delta in deltas)
        started, *progress, done = deltas
        assert (started[key], started["parse_status"]) == ("", words[0])
        assert {delta["parse_status"] for delta in progress} == {words[1]}
        assert "".join(delta[key] for delta in progress) == JSON_REPLY
        assert done["parse_status"] == words[2]
        assert done[key] | call == done[key]
        assert list(done[key]) == ["call_id", "tool_name", "arguments"]


def test_llama_stack_tells_a_cut_call_as_failed_and_as_text(checkpoint):
    cut = JSON_REPLY[:-6]
    for path, word, key in ((OLD, "failure", "content"), (NEW, "failed", "tool_call")):
        (plain, streamed), _ = post(
            checkpoint, says(cut, finish_reason="length"), STACK_BODY,
            STACK_BODY | {"stream": True}, path=path,
        )  # fmt: skip
        message = plain.json()["completion_message"]
        assert (message["content"], message["tool_calls"]) == (cut, [])
        assert message["stop_reason"] == "out_of_tokens"
        *_, failed, last = [frame["event"] for frame in frames_of(streamed)]
        assert (failed["delta"]["parse_status"], failed["delta"][key]) == (word, cut)
        assert last["stop_reason"] == "out_of_tokens"


def test_llama_stack_renders_tools_in_the_format_that_is_asked_for(checkpoint):
    def prompt_with(**fields):
        _, engine = post(checkpoint, says("x"), STACK_BODY | fields, path=NEW)
        ids = engine.requests[0].prompt_token_ids
        return TOKENIZER.decode(ids, skip_special_tokens=False)

    assert "respond with a JSON for a function call" in prompt_with()
    assert "<function=example_function_name>" in prompt_with(tool_prompt_format="function_tag")
    lists = prompt_with(tool_config={"tool_prompt_format": "python_list"})
    assert "[func_name1(params_name1=params_value1" in lists


def test_row_21_a_tool_that_spells_special_tokens_stays_text(checkpoint):
    specials = set(TOKENIZER.get_added_tokens_decoder())

    def ids_with(mark, path, body):
        tools = json.loads(json.dumps(TOOLS if path == CHAT else STACK_TOOLS).replace("city", mark))
        _, engine = post(checkpoint, says("x"), body | {"tools": tools}, path=path)
        return engine.requests[0].prompt_token_ids

    for path, body in ((CHAT, BODY), (OLD, STACK_BODY), (NEW, STACK_BODY)):
        plain, spelled = (ids_with(mark, path, body) for mark in ("town", "<|eot_id|>"))
        assert [one for one in plain if one in specials] == [
            one for one in spelled if one in specials
        ]
        assert "<|eot_id|>" in TOKENIZER.decode(spelled, skip_special_tokens=True)


def test_a_reply_in_several_tokens_a_step_gives_the_same(checkpoint):
    def script(request):
        ids = TOKENIZER.encode(REPLIES[4][0], add_special_tokens=False).ids
        yield SequenceOutput(request_id="r", token_ids=[*ids, 128009], finish_reason="stop")

    (plain,), _ = post(checkpoint, script, BODY)
    message = plain.json()["choices"][0]["message"]
    assert message["content"] == "Hm."
    assert message["tool_calls"][0]["function"]["arguments"] == ARGUMENTS


@pytest.mark.parametrize("path", GENERATION_ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_row_25_hostile_output_is_answered_on_every_route(checkpoint, path, stream):
    body = (BODY if path == CHAT else STACK_BODY) | {"stream": stream}
    for part in ("<function=get_time>{", "[get_time(a=[", '<|python_tag|>get_time(a="\\', "}{"):
        ids = TOKENIZER.encode(part * 100, add_special_tokens=False).ids
        steps = [ids[begin : begin + 100] for begin in range(0, len(ids), 100)]
        script = [SequenceOutput(request_id="r", token_ids=step) for step in steps]
        last = SequenceOutput(request_id="r", token_ids=[128009], finish_reason="stop")
        (answer,), _ = post(checkpoint, lambda _, s=(*script, last): s, body, path=path)
        assert answer.status_code == 200
        assert '"error"' not in answer.text
