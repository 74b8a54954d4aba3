"""OpenAI's SDK, 1.x and today's: its own helpers' answers go back as they came, three turns."""

from typing import Literal

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

QUESTIONS = ("What is in this image?", "How many shapes are there?", "What colour is the circle?")


class Scene(BaseModel):
    """What a picture shows."""

    colour: Literal["red", "blue"]
    is_drawn: bool


class Turn(BaseModel):
    """Turn around."""

    to: Literal["left", "right"]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture
def call(model):
    return {"model": model, "temperature": 0, "max_tokens": 64}


def about(picture, question):
    image = {"type": "image_url", "image_url": {"url": picture.url}}
    return {"role": "user", "content": [image, {"type": "text", "text": question}]}


def turns(picture):
    return [about(picture, QUESTIONS[0]), *({"role": "user", "content": q} for q in QUESTIONS[1:])]


def streamed(client, **call):
    """The answer that the SDK's helper makes of a stream."""
    with client.beta.chat.completions.stream(**call) as stream:
        stream.until_done()
        return stream.get_final_completion().choices[0].message


def test_parsed_objects_are_echoed(client, call, shapes):
    plain, of_stream = [], []
    for asked in turns(shapes):
        plain.append(asked)
        of_stream.append(asked)
        reply = client.beta.chat.completions.parse(messages=plain, response_format=Scene, **call)
        message = streamed(client, messages=of_stream, response_format=Scene, **call)
        assert isinstance(message.parsed, Scene)
        assert message.parsed == reply.choices[0].message.parsed
        plain.append(reply.choices[0].message)
        of_stream.append(message.model_dump())


def test_parsed_calls_about_a_picture_are_echoed(client, call, shapes):
    tools = [openai.pydantic_function_tool(Turn)]
    forced = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, **call}
    plain, of_stream = [], []
    for asked in turns(shapes):
        plain.append(asked)
        of_stream.append(asked)
        reply = client.beta.chat.completions.parse(messages=plain, **forced).choices[0].message
        message = streamed(client, messages=of_stream, **forced)
        for messages, one in ((plain, reply), (of_stream, message)):
            [made] = one.tool_calls
            assert isinstance(made.function.parsed_arguments, Turn)
            result = {"role": "tool", "tool_call_id": made.id, "content": "turned"}
            messages += [one, result]


@pytest.mark.parametrize("tools", [None, [openai.pydantic_function_tool(Turn)]])
def test_parsed_responses_are_echoed(client, model, shapes, tools):
    image = {"type": "input_image", "image_url": shapes.url, "detail": "auto"}
    content = [image, {"type": "input_text", "text": QUESTIONS[0]}]
    items = [{"role": "user", "content": content}]
    call = {"model": model, "temperature": 0, "max_output_tokens": 64}
    if tools is None:
        call |= {"text_format": Scene}
    else:
        function = {"type": "function", **tools[0]["function"]}
        call |= {"tools": [function], "tool_choice": "required", "parallel_tool_calls": False}
    for question in (*QUESTIONS[1:], "And now?"):
        reply = client.responses.parse(input=items, **call)
        with client.responses.stream(input=items, **call) as stream:
            final = stream.until_done().get_final_response()
        for one in (reply, final):
            found = one.output_parsed if tools is None else one.output[0].arguments
            assert found
        items += final.output
        items += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "turned"}
            for item in final.output
            if item.type == "function_call"
        ]
        items.append({"role": "user", "content": question})


def test_every_event_and_answer_is_of_the_type_that_the_sdk_declares(client, model, shapes):
    """Strictly: the SDK itself reads answers without a check, and its users by their types."""
    types = pytest.importorskip("openai.types.responses")
    image = {"type": "input_image", "image_url": shapes.url, "detail": "auto"}
    content = [image, {"type": "input_text", "text": QUESTIONS[0]}]
    function = {"type": "function", **openai.pydantic_function_tool(Turn)["function"]}
    forced = {"tools": [function], "tool_choice": "required", "parallel_tool_calls": False}
    call = {"model": model, "temperature": 0, "max_output_tokens": 64}
    for more in ({}, forced):
        body = call | more | {"input": [{"role": "user", "content": content}]}
        raw = client.responses.with_raw_response.create(**body)
        types.Response.model_validate_json(raw.text)
        found = client.responses.with_raw_response.retrieve(raw.parse().id)
        types.Response.model_validate_json(found.text)
        with client.responses.with_streaming_response.create(**body, stream=True) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines()]
        events = [line for line in lines if line.startswith("{")]
        assert len(events) > 5
        for event in events:
            TypeAdapter(types.ResponseStreamEvent).validate_json(event)
    chat = {"model": model, "max_tokens": 8, "messages": [about(shapes, QUESTIONS[0])]}
    whole = client.chat.completions.with_raw_response.create(**chat)
    ChatCompletion.model_validate_json(whole.text)
    with client.chat.completions.with_streaming_response.create(**chat, stream=True) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines()]
    chunks = [line for line in lines if line.startswith("{")]
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(chunk)
    assert chunks
