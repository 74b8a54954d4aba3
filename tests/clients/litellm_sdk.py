"""LiteLLM's SDK, as a client of an OpenAI-compatible server and of vLLM's."""

import asyncio
import json
from typing import Literal

import litellm
import pytest
from litellm.exceptions import MidStreamFallbackError
from pydantic import BaseModel

litellm.telemetry = False
PROVIDERS = ["openai", "hosted_vllm"]
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
            # For vLLM, LiteLLM leaves additionalProperties out.
            "maxProperties": 1,
        },
    },
}


class Scene(BaseModel):
    """What a picture shows."""

    colour: Literal["red", "blue"]
    is_drawn: bool


@pytest.fixture(params=PROVIDERS)
def provider(request):
    return request.param


@pytest.fixture
def options(provider, url, model):
    return fields(provider, url, model, temperature=0, max_tokens=64)


@pytest.fixture
def scripted(provider, scripted_url, scripted_model):
    return fields(provider, scripted_url, scripted_model, "secret")


def fields(provider, url, model, key="unused", **more):
    place = {"api_base": f"{url}/v1", "api_key": key, "timeout": 120, "max_retries": 0}
    return {"model": f"{provider}/{model}", **place, **more}


def about(picture, question):
    content = [
        {"type": "image_url", "image_url": {"url": picture.url}},
        {"type": "text", "text": question},
    ]
    return {"role": "user", "content": content}


def ask(options, messages, **more):
    return litellm.completion(messages=messages, **options, **more)


def streamed(options, messages, **more):
    """A stream's chunks, and the answer that LiteLLM builds of them."""
    chunks = list(
        ask(options, messages, stream=True, stream_options={"include_usage": True}, **more)
    )
    return chunks, litellm.stream_chunk_builder(chunks, messages=messages)


def test_three_turns_about_a_picture_are_answered_plain_and_streamed(options, shapes):
    (first, answer), (second, _), (third, _), *_ = shapes.answers.items()
    plain, of_stream = [about(shapes, first)], [about(shapes, first)]
    for number, question in enumerate((first, second, third)):
        if number:
            plain.append({"role": "user", "content": question})
            of_stream.append({"role": "user", "content": question})
        reply = ask(options, plain)
        message = reply.choices[0].message
        assert number or message.content == answer
        assert reply.choices[0].finish_reason == "stop"
        chunks, built = streamed(options, of_stream)
        assert len(chunks) > 3
        assert built.choices[0].message.content == message.content
        assert built.usage.total_tokens == reply.usage.total_tokens
        plain.append(message)
        of_stream.append(built.choices[0].message.model_dump())


def test_an_answer_about_a_picture_has_a_form(options, shapes):
    asked = [about(shapes, "What colour is the circle?")]
    reply = ask(options, asked, response_format=Scene)
    scene = Scene.model_validate_json(reply.choices[0].message.content)
    _, built = streamed(options, asked, response_format=Scene)
    assert Scene.model_validate_json(built.choices[0].message.content) == scene
    free = ask(options, asked, response_format={"type": "json_object"})
    assert free.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "turn"}}])
def test_a_tool_is_called_about_a_picture(options, shapes, choice):
    more = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    messages = [about(shapes, "What is in this image?")]
    reply = ask(options, messages, **more)
    [call] = reply.choices[0].message.tool_calls
    assert call.function.name == "turn"
    assert json.loads(call.function.arguments)["to"] in ("left", "right")
    _, built = streamed(options, messages, **more)
    [of_stream] = built.choices[0].message.tool_calls
    assert of_stream.function.arguments == call.function.arguments
    for message, one in ((reply.choices[0].message, call), (built.choices[0].message, of_stream)):
        result = {"role": "tool", "tool_call_id": one.id, "content": "turned", "name": "turn"}
        answer = ask(options, [*messages, message, result], tools=[TOOL])
        assert answer.choices[0].finish_reason in ("stop", "length")


def test_calls_go_round_plain_and_streamed(scripted):
    messages = []
    for number in range(3):
        messages.append({"role": "user", "content": "Call"})
        if number % 2:
            _, reply = streamed(scripted, messages, tools=[TOOL])
        else:
            reply = ask(scripted, messages, tools=[TOOL])
        assert reply.choices[0].finish_reason == "tool_calls"
        [call] = reply.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"to": "left"}
        messages += [
            reply.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "turned"},
        ]
        answer = ask(scripted, messages, tools=[TOOL])
        assert answer.choices[0].message.content == "It is done."
        messages.append(answer.choices[0].message)


def test_what_litellm_adds_to_a_message_is_taken(options, shapes):
    [(question, answer), *_] = shapes.answers.items()
    thought = {
        "role": "assistant",
        "content": answer,
        "reasoning_content": "I look.",
        "thinking_blocks": [{"type": "thinking", "thinking": "I look.", "signature": "x"}],
        "provider_specific_fields": {"reasoning": "I look."},
    }
    cached = {"type": "text", "text": question, "cache_control": {"type": "ephemeral"}}
    picture = about(shapes, question)["content"][0]
    asked = [{"role": "user", "content": [picture, cached]}]
    follow = [*asked, thought, {"role": "user", "content": "How many shapes are there?"}]
    assert ask(options, asked).choices[0].message.content == answer
    assert ask(options, follow).choices[0].message.content


def test_responses_and_messages_go_through(provider, options, url, model, shapes):
    [(question, answer), *_] = shapes.answers.items()
    content = [
        {"type": "input_image", "image_url": shapes.url},
        {"type": "input_text", "text": question},
    ]
    place = {name: options[name] for name in ("model", "api_base", "api_key", "temperature")}
    asked = [{"role": "user", "content": content}]
    reply = litellm.responses(input=asked, max_output_tokens=64, **place)
    assert reply.output[0].content[0].text == answer
    *_, last = litellm.responses(input=asked, max_output_tokens=64, stream=True, **place)
    assert last.type == "response.completed"
    assert last.response.output[0].content[0].text == answer


def test_anthropic_s_shape_is_translated(options, shapes):
    [(question, answer), *_] = shapes.answers.items()
    source = {"type": "base64", "media_type": "image/png", "data": shapes.base64}
    content = [{"type": "image", "source": source}, {"type": "text", "text": question}]

    async def run():
        asked = [{"role": "user", "content": content}]
        return await litellm.anthropic.messages.acreate(messages=asked, **options)

    reply = asyncio.run(run())
    assert reply["content"][0]["text"] == answer


def test_text_is_completed(provider, url, model):
    name = "text-completion-openai" if provider == "openai" else provider
    options = fields(name, url, model, temperature=0, max_tokens=4)
    assert litellm.text_completion(prompt="There is a red", **options).choices[0].text


def test_errors_are_litellm_s_own(provider, options, scripted, url):
    question = [{"role": "user", "content": "Busy"}]
    with pytest.raises(litellm.RateLimitError):
        ask(scripted, question)
    with pytest.raises(litellm.NotFoundError):
        ask(fields(provider, url, "other"), question)
    with pytest.raises(litellm.BadRequestError, match="did you mean seed"):
        ask(options, question, extra_body={"sead": 1})
    with pytest.raises(litellm.AuthenticationError):
        ask(scripted | {"api_key": "wrong"}, question)
    with pytest.raises(MidStreamFallbackError, match="engine"):
        streamed(scripted, [{"role": "user", "content": "Break"}])
