"""OpenAI's SDK, 1.x and today's, against the bundled model and a scripted engine."""

import asyncio
import base64
import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

TOOL = {
    "type": "function",
    "function": {
        "name": "turn",
        "description": "Turn around",
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["left", "right"]}},
            "required": ["to"],
            "additionalProperties": False,
        },
    },
}


def client_at(url, key="unused", kind=openai.OpenAI):
    return kind(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture
def client(url):
    with client_at(url) as made:
        yield made


@pytest.fixture
def scripted(scripted_url):
    with client_at(scripted_url, "secret") as made:
        yield made


def image(picture, **fields):
    return {"type": "image_url", "image_url": {"url": picture.url, **fields}}


def text(words):
    return {"type": "text", "text": words}


def about(picture, question, **fields):
    content = [image(picture, **fields), text(question)]
    return [{"role": "user", "content": content}]


def things(description):
    """What a description names, but for its background."""
    return set(re.findall(r"an? (\w+ \w+)", description.partition(" on ")[0]))


def greedy(model, messages, **fields):
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 48} | fields


def test_models_are_listed_and_retrieved(client, model):
    assert [one.id for one in client.models.list()] == [model]
    found = client.models.retrieve(model)
    assert (found.id, found.object, found.owned_by) == (model, "model", "system")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_a_picture_is_described_truly_plain_and_streamed(client, model, shapes):
    for question, answer in shapes.answers.items():
        call = greedy(model, about(shapes, question))
        plain = client.chat.completions.create(**call)
        assert plain.choices[0].message.content == answer
        assert plain.choices[0].message.role == "assistant"
        assert plain.choices[0].finish_reason == "stop"
        usage = plain.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        options = {"include_usage": True}
        with client.chat.completions.create(**call, stream=True, stream_options=options) as stream:
            *chunks, last = list(stream)
        assert (last.choices, last.usage.total_tokens) == ([], usage.total_tokens)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == answer
        assert len([piece for piece in pieces if piece]) > 2
        assert chunks[0].choices[0].delta.role == "assistant"
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_several_pictures_are_seen_each_in_its_turn(client, model, shapes, other):
    first = about(shapes, "What is in this image?")
    ((question, answer),) = other.answers.items()
    told = {"role": "assistant", "content": shapes.answers["What is in this image?"]}
    messages = [*first, told, *about(other, question)]
    reply = client.chat.completions.create(**greedy(model, messages))
    assert reply.choices[0].message.content == answer

    both = [image(shapes), image(other), text(question)]
    seen = client.chat.completions.create(**greedy(model, [{"role": "user", "content": both}]))
    alone = client.chat.completions.create(**greedy(model, about(other, question)))
    assert seen.usage.prompt_tokens == alone.usage.prompt_tokens + 1
    named = things(seen.choices[0].message.content)
    assert named == things(answer) | things(shapes.answers["What is in this image?"])


@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_detail_and_a_system_message_leave_the_answer_true(client, model, shapes, detail):
    system = {"role": "system", "content": "You are a helpful assistant."}
    # The small model counts badly in the one tile of `low`.
    question = "What colour is the background?"
    messages = [system, *about(shapes, question, detail=detail)]
    reply = client.chat.completions.create(**greedy(model, messages))
    assert reply.choices[0].message.content == shapes.answers[question]


def test_several_answers_and_their_logprobs(client, model, shapes):
    question = "How many shapes are there?"
    call = greedy(model, about(shapes, question), n=2, logprobs=True, top_logprobs=2)
    reply = client.chat.completions.create(**call)
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.message.content == shapes.answers[question]
        spelled = b"".join(bytes(one.bytes or ()) for one in choice.logprobs.content)
        assert spelled.decode() == choice.message.content
        for entry in choice.logprobs.content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 2
            assert entry.logprob == max(top.logprob for top in entry.top_logprobs)


def test_a_stop_string_and_a_cut_end_the_answer(client, model, shapes):
    call = greedy(model, about(shapes, "What is in this image?"))
    stopped = client.chat.completions.create(**call, stop=[" and"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("There is a red circle", "stop")
    cut = client.chat.completions.create(**call | {"max_tokens": 3}).choices[0]
    assert cut.finish_reason == "length"
    newer = {key: value for key, value in call.items() if key != "max_tokens"}
    reply = client.chat.completions.create(**newer, max_completion_tokens=3)
    assert reply.usage.completion_tokens == 3


class Scene(BaseModel):
    colour: Literal["red", "blue"]
    is_drawn: bool


def test_an_answer_is_parsed_into_a_pydantic_model(client, model, shapes):
    call = greedy(model, about(shapes, "What colour is the circle?"), max_tokens=200)
    reply = client.beta.chat.completions.parse(**call, response_format=Scene)
    assert isinstance(reply.choices[0].message.parsed, Scene)
    with client.beta.chat.completions.stream(**call, response_format=Scene) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == reply.choices[0].message.parsed


def test_a_form_is_kept_by_json_and_by_the_guided_fields(client, model, shapes):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    call = greedy(model, about(shapes, "What colour is the circle?"))
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    reply = client.chat.completions.create(**call, response_format=form)
    assert json.loads(reply.choices[0].message.content)["colour"] in ("red", "blue")
    regex = {"guided_regex": r"The circle is (green|red|blue)\."}
    for body in (regex, {"nvext": regex}):
        reply = client.chat.completions.create(**call, extra_body=body)
        assert reply.choices[0].message.content == "The circle is red."


def test_a_required_call_comes_plain_streamed_and_accumulated(client, model):
    call = greedy(
        model, [{"role": "user", "content": "Turn around."}], tools=[TOOL], tool_choice="required"
    )
    call |= {"parallel_tool_calls": False, "max_tokens": 64}
    choice = client.chat.completions.create(**call).choices[0]
    (made,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (made.type, made.function.name) == ("function", "turn")
    assert json.loads(made.function.arguments)["to"] in ("left", "right")
    with client.beta.chat.completions.stream(**call) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls
    assert streamed.function.arguments == made.function.arguments
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].finish_reason == "tool_calls"


def test_the_async_client_asks_many_at_once(url, model, shapes):
    async def ask(client, question):
        stream = await client.chat.completions.create(
            **greedy(model, about(shapes, question)), stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run():
        async with client_at(url, kind=openai.AsyncOpenAI) as client:
            plain = await client.chat.completions.create(
                **greedy(model, about(shapes, "Is there a square?"))
            )
            return plain, await asyncio.gather(*(ask(client, one) for one in shapes.answers))

    plain, answers = asyncio.run(run())
    assert plain.choices[0].message.content == "No, there is no square."
    assert answers == list(shapes.answers.values())


def test_raw_and_streaming_responses_tell_the_head(client, model, shapes):
    call = greedy(model, about(shapes, "Is there a square?"))
    raw = client.chat.completions.with_raw_response.create(**call)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == "No, there is no square."
    assert raw.parse()._request_id == raw.headers["x-request-id"]
    with client.chat.completions.with_streaming_response.create(**call, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_a_request_id_of_the_clients_own_comes_back(client, model):
    call = greedy(model, [{"role": "user", "content": "Hello"}])
    headers = {"X-Request-Id": "my-request-1"}
    raw = client.chat.completions.with_raw_response.create(**call, extra_headers=headers)
    assert raw.headers["x-request-id"] == "my-request-1"


def test_text_is_completed_plain_streamed_and_as_token_ids(client, model):
    call = {"model": model, "prompt": "There is a red", "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(**call)
    assert (plain.object, len(plain.choices)) == ("text_completion", 1)
    assert plain.choices[0].text
    assert plain.usage.completion_tokens <= 4
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**call, stream=True)]
    assert "".join(pieces) == plain.choices[0].text
    echoed = client.completions.create(**call, echo=True, logprobs=1)
    assert echoed.choices[0].text == call["prompt"] + plain.choices[0].text
    assert "".join(echoed.choices[0].logprobs.tokens).endswith(echoed.choices[0].text)
    several = client.completions.create(**call | {"prompt": ["a", "There is a red"]})
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[1].text == plain.choices[0].text
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**call, suffix="x")
    assert caught.value.param == "suffix"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "temperature"),
        ({"messages": []}, "messages", "messages"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean temperature"),
        ({"max_tokens": 10**6}, "max_tokens", "max_model_len"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"tools": [TOOL] * 2}, "tools", "turn"),
    ],
)
def test_a_bad_field_raises_bad_request_that_names_it(client, model, fields, param, words):
    call = greedy(model, [{"role": "user", "content": "Hello"}]) | fields
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            client.chat.completions.create(**call, stream=stream)
        assert caught.value.status_code == 400
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert caught.value.body["message"]
        assert caught.value.request_id


def test_a_bad_picture_raises_bad_request(client, model, shapes):
    broken = type(shapes)(base64.b64encode(b"no picture at all").decode(), {})
    for picture in (broken, type(shapes)("???", {})):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**greedy(model, about(picture, "What is it?")))
        assert caught.value.param.startswith("messages[0].content[0].image_url")


def test_an_unknown_model_and_path_raise_not_found(client):
    with pytest.raises(openai.NotFoundError, match="gpt-4o") as caught:
        client.chat.completions.create(**greedy("gpt-4o", [{"role": "user", "content": "Hello"}]))
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="x", input="x")


def ask(client, model, words, **fields):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": words}], **fields
    )


def test_a_wrong_key_raises_authentication_error(scripted_url, scripted_model):
    with (
        client_at(scripted_url, "wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        ask(client, scripted_model, "Hello")
    assert caught.value.code == "invalid_api_key"


def test_a_full_queue_raises_rate_limit_error_with_retry_after(scripted, scripted_model):
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            ask(scripted, scripted_model, "Busy", stream=stream)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "queue_full"


def test_a_dead_engine_raises_internal_server_error(scripted, scripted_model):
    with pytest.raises(openai.InternalServerError) as caught:
        ask(scripted, scripted_model, "Break")
    assert caught.value.status_code == 503


def test_an_error_in_the_middle_of_a_stream_raises_api_error(scripted, scripted_model):
    stream = ask(scripted, scripted_model, "Break", stream=True)
    first, second = next(stream), next(stream)
    assert (first.choices[0].delta.content, second.choices[0].delta.content) == ("", "What")
    with pytest.raises(openai.APIError, match="engine"):
        next(stream)


def test_comments_that_fill_silence_are_no_chunks(scripted, scripted_model):
    with scripted.chat.completions.with_streaming_response.create(
        model=scripted_model, messages=[{"role": "user", "content": "Slow"}], stream=True
    ) as response:
        assert any(line.startswith(":") for line in response.iter_lines())
    stream = ask(scripted, scripted_model, "Slow", stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == "What is in this image?"


def test_a_call_of_the_models_own_accord_makes_the_round_trip(scripted, scripted_model):
    messages = [{"role": "user", "content": "Call"}]
    first = scripted.chat.completions.create(model=scripted_model, messages=messages, tools=[TOOL])
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"to": "left"}
    messages += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    second = scripted.chat.completions.create(model=scripted_model, messages=messages, tools=[TOOL])
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.content == "It is done."


@pytest.mark.skipif(not hasattr(openai.OpenAI, "responses"), reason="an SDK before responses")
def test_responses_see_the_picture_of_the_response_they_continue(client, model, shapes):
    [(first, answer), (second, _), *_] = shapes.answers.items()
    content = [
        {"type": "input_image", "image_url": shapes.url, "detail": "auto"},
        {"type": "input_text", "text": first},
    ]
    call = {"model": model, "temperature": 0, "max_output_tokens": 48}
    described = client.responses.create(input=[{"role": "user", "content": content}], **call)
    assert described.output_text == answer
    counted = client.responses.create(input=second, previous_response_id=described.id, **call)
    echoed = client.responses.create(
        input=[
            {"role": "user", "content": content},
            *described.output,
            {"role": "user", "content": second},
        ],
        **call,
    )
    assert counted.output_text == echoed.output_text
    stream = client.responses.create(
        input=[{"role": "user", "content": content}], stream=True, store=False, **call
    )
    events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == answer


@pytest.mark.skipif(not hasattr(openai.OpenAI, "responses"), reason="an SDK before responses")
def test_calls_of_responses_go_round(scripted, scripted_model):
    tool = {"type": "function", "strict": False, **TOOL["function"]}
    call = {"model": scripted_model, "tools": [tool]}
    asked = scripted.responses.create(input="Call", **call)
    [item] = asked.output
    assert (item.name, json.loads(item.arguments)) == ("turn", {"to": "left"})
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "turned"}
    done = scripted.responses.create(input=[result], previous_response_id=asked.id, **call)
    assert done.output_text == "It is done."
    with pytest.raises(openai.RateLimitError):
        scripted.responses.create(input="Busy", **call)
