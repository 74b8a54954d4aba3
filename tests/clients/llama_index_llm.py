"""LlamaIndex's OpenAILike, with pictures, tools and structured answers."""

import asyncio
from typing import Literal

import openai
import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict


class Scene(BaseModel):
    """What a picture shows."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]
    is_drawn: bool


def turn(to: Literal["left", "right"]) -> str:
    """Turn around."""
    return f"turned {to}"


TURN = FunctionTool.from_defaults(turn)
WAYS = {
    "tools": {"is_function_calling_model": True},
    "response_format": {"should_use_structured_outputs": True},
}


def llm_at(url, model, key="unused", **fields):
    options = {"is_chat_model": True, "temperature": 0, "max_tokens": 64, "max_retries": 0}
    place = {"api_base": f"{url}/v1", "api_key": key, "model": model, "timeout": 120}
    return OpenAILike(**place, **options | fields)


@pytest.fixture
def llm(url, model):
    return llm_at(url, model, is_function_calling_model=True)


@pytest.fixture
def scripted(scripted_url, scripted_model):
    return llm_at(scripted_url, scripted_model, "secret", is_function_calling_model=True)


def about(picture, question):
    block = ImageBlock(url=picture.url)
    return ChatMessage(role="user", blocks=[block, TextBlock(text=question)])


def last(stream):
    *_, final = stream
    return final


def test_three_turns_about_a_picture_are_answered_plain_and_streamed(llm, shapes):
    (first, answer), (second, _), (third, _), *_ = shapes.answers.items()
    plain, streamed = [about(shapes, first)], [about(shapes, first)]
    for number, question in enumerate((first, second, third)):
        if number:
            plain.append(ChatMessage(question))
            streamed.append(ChatMessage(question))
        reply, of_stream = llm.chat(plain), last(llm.stream_chat(streamed))
        assert number or reply.message.content == answer
        assert of_stream.message.content == reply.message.content
        plain.append(reply.message)
        streamed.append(of_stream.message)


def test_a_picture_in_bytes_is_seen(llm, shapes):
    [(question, answer), *_] = shapes.answers.items()
    block = ImageBlock(image=shapes.base64.encode(), image_mimetype="image/png", detail="high")
    asked = ChatMessage(role="user", blocks=[TextBlock(text=question), block])
    assert llm.chat([asked]).message.content == answer


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_about_a_picture_is_an_object(url, model, shapes, way):
    structured = llm_at(url, model, **WAYS[way]).as_structured_llm(Scene)
    asked = [about(shapes, "What colour is the circle?")]
    reply = structured.chat(asked)
    assert isinstance(reply.raw, Scene)
    # A stream in LlamaIndex's way of tools does not ask for the call, which a small model then
    # does not make of its own accord.
    if way == "response_format":
        assert last(structured.stream_chat(asked)).raw == reply.raw


def test_a_required_tool_is_called_about_a_picture_plain_and_streamed(llm, shapes):
    asked = [about(shapes, "What is in this image?")]
    options = {"tool_required": True, "allow_parallel_tool_calls": False, "strict": True}
    reply = llm.chat_with_tools([TURN], chat_history=asked, **options)
    [call] = llm.get_tool_calls_from_response(reply)
    assert (call.tool_name, call.tool_kwargs["to"] in ("left", "right")) == ("turn", True)
    streamed = last(llm.stream_chat_with_tools([TURN], chat_history=asked, **options))
    [same] = llm.get_tool_calls_from_response(streamed)
    assert same.tool_kwargs == call.tool_kwargs
    for one, message in ((call, reply.message), (same, streamed.message)):
        result = tool_result(one)
        follow = llm.chat_with_tools([TURN], chat_history=[*asked, message, result])
        assert follow.raw.choices[0].finish_reason in ("stop", "length")


def tool_result(call):
    more = {"tool_call_id": call.tool_id}
    return ChatMessage(role=MessageRole.TOOL, content="turned", additional_kwargs=more)


def test_calls_go_round(scripted):
    history = []
    for _ in range(3):
        history.append(ChatMessage("Call"))
        reply = scripted.chat_with_tools([TURN], chat_history=history)
        [call] = scripted.get_tool_calls_from_response(reply)
        assert call.tool_kwargs == {"to": "left"}
        history += [reply.message, tool_result(call)]
        answer = scripted.chat_with_tools([TURN], chat_history=history)
        assert answer.message.content == "It is done."
        history.append(answer.message)


def test_async_answers_alike(llm, shapes):
    [(question, answer), *_] = shapes.answers.items()

    async def run():
        plain = await llm.achat([about(shapes, question)])
        streamed = [part.delta async for part in await llm.astream_chat([about(shapes, question)])]
        return plain.message.content, "".join(streamed)

    assert asyncio.run(run()) == (answer, answer)


def test_text_is_completed(url, model):
    llm = llm_at(url, model, is_chat_model=False, max_tokens=4)
    reply = llm.complete("There is a red").text
    assert reply
    assert last(llm.stream_complete("There is a red")).text == reply


def test_errors_are_the_sdk_s_own(llm, scripted, url):
    with pytest.raises(openai.NotFoundError):
        llm_at(url, "other").chat([ChatMessage("Hello")])
    with pytest.raises(openai.BadRequestError, match="did you mean seed"):
        llm.chat([ChatMessage("Hello")], extra_body={"sead": 1})
    with pytest.raises(openai.RateLimitError):
        scripted.chat([ChatMessage("Busy")])
    with pytest.raises(openai.APIError, match="engine"):
        list(scripted.stream_chat([ChatMessage("Break")]))
