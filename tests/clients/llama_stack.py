"""Llama Stack's own client, one version of every line, against a bundled model and a script.

The lines differ in their model's key, contents, roles, strategies and deltas: `Line` knows how.
"""

import asyncio
import json
import re
from dataclasses import dataclass
from importlib.metadata import version

import llama_stack_client
import pytest
from llama_stack_client import AsyncLlamaStackClient, LlamaStackClient

VERSION = tuple(int(part) for part in version("llama-stack-client").split("."))
PREFIXES = ["", "/ls", "/experimental/ls"]
TOOL = {
    "tool_name": "turn",
    "description": "Turn around",
    "parameters": {"to": {"param_type": "bool", "description": "left or not", "required": True}},
}


@dataclass(frozen=True)
class Line:
    """How one line of clients writes what all of them say."""

    model_key: str
    images: str
    tool_role: str
    is_new: bool

    def strategy(self, name, **numbers):
        if self.is_new:
            return {"strategy": {"type": name, **numbers}}
        return {"strategy": name, **numbers}

    def image_items(self, picture):
        """The picture in each of the line's spellings."""
        uri = {"uri": picture.url}
        return {
            "bare": [{"image": uri}],
            "flat": [{"type": "image", "url": uri}, {"type": "image", "data": picture.base64}],
            "nested": [
                {"type": "image", "image": {"url": uri}},
                {"type": "image", "image": {"data": picture.base64}},
            ],
        }[self.images]

    def text(self, words):
        return words if self.images == "bare" else {"type": "text", "text": words}

    def text_of(self, delta):
        return delta.text if self.is_new else delta


def line_of(number):
    if number >= (0, 1):
        return Line("model_id", "nested", "tool", True)
    if number >= (0, 0, 62):
        return Line("model_id", "flat", "ipython", False)
    return Line("model_id" if number >= (0, 0, 53) else "model", "bare", "ipython", False)


LINE = line_of(VERSION)


def client_at(url, prefix="/ls", kind=LlamaStackClient, **options):
    return kind(base_url=url + prefix, max_retries=0, timeout=120, **options)


@pytest.fixture
def client(url):
    with client_at(url) as made:
        yield made


@pytest.fixture
def scripted(scripted_url):
    with client_at(scripted_url, default_headers={"Authorization": "Bearer secret"}) as made:
        yield made


def complete(client, model, messages, **fields):
    params = LINE.strategy("greedy") | {"max_tokens": 64}
    call = {LINE.model_key: model, "messages": messages, "sampling_params": params} | fields
    if VERSION < (0, 0, 53) and "response_format" in call:
        # The oldest line knows no such parameter, but sends what it is told to.
        call["extra_body"] = {"response_format": call.pop("response_format")}
    return client.inference.chat_completion(**call)


def user(*content):
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def about(picture, question):
    return user(LINE.image_items(picture)[0], LINE.text(question))


def events_of(stream):
    """The events of a whole stream: start, progress, complete, and one stop_reason at the end."""
    events = [chunk.event for chunk in stream]
    kinds = [event.event_type for event in events]
    assert kinds == ["start"] + ["progress"] * (len(kinds) - 2) + ["complete"]
    assert [event.stop_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert LINE.text_of(events[0].delta) == LINE.text_of(events[-1].delta) == ""
    return events


@pytest.mark.skipif(not LINE.is_new, reason="the older lines have other paths for models")
def test_models_are_listed_and_retrieved(client, model):
    (found,) = client.models.list()
    assert (found.identifier, found.type) == (model, "model")
    retrieved = client.models.retrieve(model)
    assert retrieved.identifier == model
    assert retrieved.metadata["max_model_len"] > 0
    with pytest.raises(llama_stack_client.NotFoundError):
        client.models.retrieve("no-such-model")


@pytest.mark.skipif(LINE.is_new, reason="the newer lines have other paths for models")
def test_older_lines_list_and_retrieve_models(client, model):
    """They used to get a 404."""
    (found,) = client.models.list()
    assert found.identifier == model
    assert found.metadata["max_model_len"] > 0
    assert client.models.retrieve(identifier=model).identifier == model
    assert client.models.retrieve(identifier="no-such-model") is None


def test_comments_that_fill_silence_are_no_events(scripted, scripted_model):
    stream = complete(scripted, scripted_model, [user("Slow")], stream=True)
    deltas = [LINE.text_of(event.delta) for event in events_of(stream)]
    assert "".join(deltas) == "What is in this image?"


def test_a_picture_is_described_truly_plain_and_streamed_under_every_prefix(url, model, shapes):
    for prefix in PREFIXES:
        with client_at(url, prefix) as client:
            for question, answer in list(shapes.answers.items())[:2]:
                plain = complete(client, model, [about(shapes, question)])
                message = plain.completion_message
                assert (message.role, message.content) == ("assistant", answer)
                assert message.stop_reason == "end_of_turn"
                assert plain.logprobs is None
                stream = complete(client, model, [about(shapes, question)], stream=True)
                events = events_of(stream)
                assert "".join(LINE.text_of(event.delta) for event in events) == answer
                assert len(events) > 4
                assert events[-1].stop_reason == "end_of_turn"


def test_every_spelling_of_a_picture_is_seen(client, model, shapes):
    question, answer = "What colour is the triangle?", "The triangle is blue."
    for item in LINE.image_items(shapes):
        for content in ([item, LINE.text(question)], [LINE.text(question), item]):
            reply = complete(client, model, [user(*content)])
            assert reply.completion_message.content == answer
    alone = complete(client, model, [user(LINE.image_items(shapes)[0])])
    assert alone.completion_message.stop_reason == "end_of_turn"


def test_several_pictures_are_seen_each_in_its_turn(client, model, shapes, other):
    first = complete(client, model, [about(shapes, "What is in this image?")])
    told = first.completion_message.model_dump()
    if told.get("tool_calls") is None:
        # What a client of an old line adds, whose type requires it.
        told["tool_calls"] = []
    ((question, answer),) = other.answers.items()
    messages = [about(shapes, "What is in this image?"), told, about(other, question)]
    assert complete(client, model, messages).completion_message.content == answer

    items = [LINE.image_items(picture)[0] for picture in (shapes, other)]
    both = complete(client, model, [user(*items, LINE.text(question))]).completion_message.content
    named = [
        set(re.findall(r"an? (\w+ \w+)", one.partition(" on ")[0]))
        for one in (both, answer, shapes.answers["What is in this image?"])
    ]
    assert named[0] == named[1] | named[2]


def test_a_system_message_and_a_context_reach_the_model(client, model, shapes):
    system = {"role": "system", "content": "You are a helpful assistant."}
    question = about(shapes, "How many shapes are there?")
    reply = complete(client, model, [system, question])
    assert reply.completion_message.content == "There are two shapes."
    turn = user(LINE.image_items(shapes)[0]) | {"context": "How many shapes are there?"}
    reply = complete(client, model, [turn])
    assert reply.completion_message.content == "There are two shapes."


@pytest.mark.parametrize(
    "params",
    [
        LINE.strategy("greedy"),
        LINE.strategy("top_p", temperature=0.01, top_p=0.9),
        LINE.strategy("top_k", top_k=1),
        LINE.strategy("greedy") | {"max_tokens": 0, "repetition_penalty": 1.0},
    ],
)
def test_every_strategy_answers(client, model, shapes, params):
    reply = complete(client, model, [about(shapes, "Is there a square?")], sampling_params=params)
    assert reply.completion_message.content == "No, there is no square."


def test_without_sampling_params_the_answer_is_greedy_and_max_tokens_cuts_it(client, model, shapes):
    call = {LINE.model_key: model, "messages": [about(shapes, "Is there a square?")]}
    reply = client.inference.chat_completion(**call)
    assert reply.completion_message.content == "No, there is no square."
    params = LINE.strategy("greedy") | {"max_tokens": 2}
    cut = client.inference.chat_completion(**call, sampling_params=params)
    assert cut.completion_message.stop_reason == "out_of_tokens"
    assert reply.completion_message.content.startswith(cut.completion_message.content)
    streamed = events_of(
        client.inference.chat_completion(**call, sampling_params=params, stream=True)
    )
    assert streamed[-1].stop_reason == "out_of_tokens"


def test_logprobs_come_plain_and_streamed(client, model, shapes):
    messages = [about(shapes, "Is there a square?")]
    plain = complete(client, model, messages, logprobs={"top_k": 2})
    chosen = [
        max(one.logprobs_by_token.items(), key=lambda pair: pair[1]) for one in plain.logprobs
    ]
    assert "".join(token for token, _ in chosen).startswith(plain.completion_message.content)
    assert all(value <= 0 for _, value in chosen)
    assert all(len(one.logprobs_by_token) == 2 for one in plain.logprobs)
    events = events_of(complete(client, model, messages, logprobs={"top_k": 2}, stream=True))
    streamed = [one for event in events for one in event.logprobs or ()]
    assert streamed == plain.logprobs


def test_an_answer_keeps_to_a_schema_and_to_a_grammar(client, model, shapes):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    messages = [about(shapes, "What colour is the circle?")]
    form = {"type": "json_schema", "json_schema": schema}
    reply = complete(client, model, messages, response_format=form)
    assert json.loads(reply.completion_message.content)["colour"] in ("red", "blue")
    bnf = 'root ::= "The circle is " ("green" | "red" | "blue") "."'
    for text in ({"root": bnf}, {"grammar": bnf}):
        form = {"type": "grammar", "bnf": text}
        reply = complete(client, model, messages, response_format=form)
        assert reply.completion_message.content == "The circle is red."


def call_parts(events):
    """(parse_status, content) of each of a stream's deltas that tells of a call."""
    deltas = [event.delta for event in events]
    parts = [delta for delta in deltas if hasattr(delta, "parse_status")]
    if LINE.is_new:
        assert {part.type for part in parts} == {"tool_call"}
    return [(one.parse_status, one.tool_call if LINE.is_new else one.content) for one in parts]


SUCCESS = "succeeded" if LINE.is_new else "success"


def test_a_required_call_comes_plain_and_streamed(client, model):
    # The form of calls bounds their number at 16: enough room for all of them.
    params = LINE.strategy("greedy") | {"max_tokens": 600}
    fields = {"tools": [TOOL], "tool_choice": "required", "sampling_params": params}
    reply = complete(client, model, [user("Turn around.")], **fields)
    calls = reply.completion_message.tool_calls
    assert calls
    for call in calls:
        assert call.tool_name == "turn"
        assert call.call_id
        assert set(call.arguments) == {"to"}
        assert isinstance(call.arguments["to"], bool)
    events = events_of(complete(client, model, [user("Turn around.")], stream=True, **fields))
    parts = call_parts(events)
    assert parts[0] == ("started", "")
    done = [content for status, content in parts if status == SUCCESS]
    assert [one.arguments for one in done] == [call.arguments for call in calls]
    assert {status for status, _ in parts} == {"started", "in_progress", SUCCESS}


def test_the_newer_tool_config_stands_for_the_older_fields(client, model):
    fields = {"tool_choice": "turn", "tool_prompt_format": "function_tag"}
    params = LINE.strategy("greedy") | {"max_tokens": 600}
    reply = complete(
        client,
        model,
        [user("Turn around.")],
        tools=[TOOL],
        sampling_params=params,
        # The older lines have no such parameter, but may send it.
        extra_body={"tool_config": fields},
    )
    assert {call.tool_name for call in reply.completion_message.tool_calls} == {"turn"}
    none = {"tool_choice": "none", "system_message_behavior": "append"}
    quiet = complete(client, model, [user("Hello")], tools=[TOOL], extra_body={"tool_config": none})
    assert quiet.completion_message.tool_calls == []
    assert quiet.completion_message.content


def test_a_call_of_the_models_own_accord_makes_the_round_trip(scripted, scripted_model):
    fields = {"tools": [TOOL], "tool_choice": "auto", "tool_prompt_format": "json"}
    first = complete(scripted, scripted_model, [user("Call")], **fields)
    message = first.completion_message
    (call,) = message.tool_calls
    assert (call.tool_name, call.arguments) == ("turn", {"to": "left"})
    assert message.content == ""
    parts = call_parts(
        events_of(complete(scripted, scripted_model, [user("Call")], stream=True, **fields))
    )
    assert [status for status, _ in parts][:2] == ["started", "in_progress"]
    assert (parts[-1][0], parts[-1][1].arguments) == (SUCCESS, call.arguments)
    # As the client's own types say: the answer itself goes back, and the result behind it.
    result = {"role": LINE.tool_role, "call_id": call.call_id, "content": "done"}
    if not LINE.is_new:
        result["tool_name"] = call.tool_name
    second = complete(scripted, scripted_model, [user("Call"), message, result], **fields)
    assert second.completion_message.content == "It is done."


def test_the_async_client_asks_many_at_once(url, model, shapes):
    async def ask(client, question):
        reply = await complete(client, model, [about(shapes, question)])
        stream = await complete(client, model, [about(shapes, question)], stream=True)
        pieces = [LINE.text_of(chunk.event.delta) async for chunk in stream]
        assert "".join(pieces) == reply.completion_message.content
        return reply.completion_message.content

    async def run():
        async with client_at(url, kind=AsyncLlamaStackClient) as client:
            return await asyncio.gather(*(ask(client, one) for one in shapes.answers))

    assert asyncio.run(run()) == list(shapes.answers.values())


def test_the_raw_response_is_the_documented_one(client, model):
    raw = client.inference.with_raw_response.chat_completion(
        **{LINE.model_key: model, "messages": [user("Hello")]}
    )
    assert raw.headers["content-type"] == "application/json"
    answer = json.loads(raw.text() if callable(raw.text) else raw.text)
    assert list(answer) == ["completion_message", "logprobs"]
    keys = ["role", "content", "stop_reason"] + ["tool_calls"] * LINE.is_new
    assert list(answer["completion_message"]) == keys


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages"),
        ({"sampling_params": LINE.strategy("top_p", temperature=9.0)}, "temperature"),
        ({"extra_body": {"mesages": 1}}, "did you mean messages"),
        ({"logprobs": {"top_k": 99}}, "logprobs.top_k"),
        ({"response_format": {"type": "grammar", "bnf": {"a": "not a grammar"}}}, "bnf"),
        ({"tools": [TOOL, TOOL]}, "turn"),
    ],
)
def test_a_bad_field_raises_bad_request_that_names_it(client, model, fields, words):
    for stream in (False, True):
        with pytest.raises(llama_stack_client.BadRequestError, match=re.escape(words)) as caught:
            complete(client, model, **{"messages": [user("Hello")], "stream": stream} | fields)
        assert caught.value.status_code == 400
        assert caught.value.body["error"]["message"]


def test_a_picture_with_tools_is_answered(client, model, shapes):
    answer = complete(client, model, [about(shapes, "Is there a square?")], tools=[TOOL])
    assert answer.completion_message.stop_reason


def test_an_unknown_model_raises_not_found(client):
    with pytest.raises(llama_stack_client.NotFoundError, match="no-such-model"):
        complete(client, "no-such-model", [user("Hello")])


def test_a_wrong_key_a_full_queue_and_a_dead_engine_raise_their_own_errors(
    scripted, scripted_url, scripted_model
):
    with (
        client_at(scripted_url) as client,
        pytest.raises(llama_stack_client.AuthenticationError),
    ):
        complete(client, scripted_model, [user("Hello")])
    for stream in (False, True):
        with pytest.raises(llama_stack_client.RateLimitError, match="full") as caught:
            complete(scripted, scripted_model, [user("Busy")], stream=stream)
        assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(llama_stack_client.InternalServerError):
        complete(scripted, scripted_model, [user("Break")])


def test_an_error_in_the_middle_of_a_stream_is_no_event(scripted, scripted_model):
    """The client's streams know no errors: theirs is a chunk without an event, told by `error`."""
    chunks = list(complete(scripted, scripted_model, [user("Break")], stream=True))
    *events, last = chunks
    assert [chunk.event.event_type for chunk in events] == ["start", "progress"]
    assert not any(hasattr(chunk, "error") for chunk in events)
    assert "engine" in last.error["message"]
    with pytest.raises(AttributeError):
        _ = last.event.delta
