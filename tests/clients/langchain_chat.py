"""LangChain's ChatOpenAI against the bundled model and a scripted engine."""

import asyncio
from typing import Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


@tool
def turn(to: Literal["left", "right"]) -> str:
    """Turn around."""
    return f"turned {to}"


class Scene(BaseModel):
    """What a picture shows."""

    colour: Literal["red", "blue"]
    is_drawn: bool


def chat_at(url, model, key="unused", **fields):
    options = {"temperature": 0, "max_tokens": 64, "max_retries": 0, "timeout": 120} | fields
    return ChatOpenAI(base_url=f"{url}/v1", api_key=key, model=model, **options)


@pytest.fixture
def chat(url, model):
    return chat_at(url, model)


@pytest.fixture
def scripted(scripted_url, scripted_model):
    return chat_at(scripted_url, scripted_model, "secret")


def blocks(picture):
    """The picture as OpenAI's block and as LangChain's own, older and newer."""
    return [
        {"type": "image_url", "image_url": {"url": picture.url}},
        {
            "type": "image",
            "source_type": "base64",
            "data": picture.base64,
            "mime_type": "image/png",
        },
        {"type": "image", "base64": picture.base64, "mime_type": "image/png"},
    ]


def about(picture, question):
    return HumanMessage([blocks(picture)[0], {"type": "text", "text": question}])


def test_every_image_block_is_seen(chat, shapes):
    for block in blocks(shapes):
        content = [{"type": "text", "text": "What is in this image?"}, block]
        reply = chat.invoke([HumanMessage(content)])
        assert reply.content == shapes.answers["What is in this image?"]
        assert reply.response_metadata["finish_reason"] == "stop"
        usage = reply.usage_metadata
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_stream_adds_up_to_the_plain_answer_and_tells_usage(chat, shapes):
    question = "How many shapes are there?"
    chunks = list(chat.stream([about(shapes, question)], stream_usage=True))
    whole = sum(chunks[1:], chunks[0])
    assert whole.content == shapes.answers[question]
    assert len(chunks) > 3
    assert whole.usage_metadata["output_tokens"] > 3


def test_a_conversation_about_two_pictures_speaks_of_the_latest(chat, shapes, other):
    ((question, answer),) = other.answers.items()
    first = chat.invoke([about(shapes, "What is in this image?")])
    reply = chat.invoke([about(shapes, "What is in this image?"), first, about(other, question)])
    assert reply.content == answer


def test_a_system_message_batch_and_async_answer_alike(chat, shapes):
    system = SystemMessage("You are a helpful assistant.")
    asked = [[system, about(shapes, question)] for question in list(shapes.answers)[:2]]
    expected = list(shapes.answers.values())[:2]
    assert [reply.content for reply in chat.batch(asked)] == expected

    async def run():
        plain = await chat.ainvoke(asked[0])
        pieces = [chunk.content async for chunk in chat.astream(asked[0])]
        return plain.content, "".join(pieces)

    assert asyncio.run(run()) == (expected[0], expected[0])


def test_logprobs_come_with_the_answer(url, model, shapes):
    chat = chat_at(url, model, logprobs=True, top_logprobs=2)
    reply = chat.invoke([about(shapes, "Is there a square?")])
    entries = reply.response_metadata["logprobs"]["content"]
    spelled = b"".join(bytes(entry["bytes"] or ()) for entry in entries)
    assert spelled.decode() == reply.content == "No, there is no square."


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_about_a_picture_is_an_object_of_its_class(chat, shapes, method):
    asked = [about(shapes, "What colour is the circle?")]
    bound = chat.with_structured_output(Scene, method=method, strict=True, include_raw=True)
    reply = bound.invoke(asked)
    assert reply["parsing_error"] is None
    assert isinstance(reply["parsed"], Scene)
    *_, last = chat.with_structured_output(Scene, method=method, strict=True).stream(asked)
    assert last == reply["parsed"]
    # The raw answer, its call or its parsed object, goes back as it came.
    result = [ToolMessage("seen", tool_call_id=call["id"]) for call in reply["raw"].tool_calls]
    assert chat.invoke([*asked, reply["raw"], *result, HumanMessage("And now?")]).content


def test_three_turns_about_a_picture_are_answered_plain_and_streamed(chat, shapes):
    plain, streamed = [], []
    for number, question in enumerate(list(shapes.answers)[:3]):
        asked = HumanMessage(question) if number else about(shapes, question)
        plain.append(asked)
        streamed.append(asked)
        reply, chunks = chat.invoke(plain), list(chat.stream(streamed))
        whole = sum(chunks[1:], chunks[0])
        assert whole.content == reply.content
        plain.append(reply)
        streamed.append(whole)


@pytest.mark.parametrize("has_picture", [False, True])
def test_a_required_tool_is_called_plain_and_streamed(chat, shapes, has_picture):
    # strict forbids further arguments, of which the bundled model would find no end.
    bound = chat.bind_tools([turn], tool_choice="turn", strict=True, parallel_tool_calls=False)
    asked = [about(shapes, "Turn around.") if has_picture else HumanMessage("Turn around.")]
    reply = bound.invoke(asked)
    (call,) = reply.tool_calls
    assert call["name"] == "turn"
    assert call["args"]["to"] in ("left", "right")
    chunks = list(bound.stream(asked))
    whole = sum(chunks[1:], chunks[0])
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [
        (call["name"], call["args"])
    ]
    assert chat.bind_tools([turn]).invoke([*asked, reply, turn.invoke(call)]).response_metadata


def test_comments_that_fill_silence_are_no_chunks(scripted):
    pieces = [chunk.content for chunk in scripted.stream("Slow")]
    assert "".join(pieces) == "What is in this image?"


def test_a_call_of_the_models_own_accord_makes_the_round_trip(scripted):
    bound = scripted.bind_tools([turn])
    messages = [HumanMessage("Call")]
    first = bound.invoke(messages)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("turn", {"to": "left"})
    assert isinstance(first, AIMessage)
    result = turn.invoke(call)
    assert isinstance(result, ToolMessage)
    assert bound.invoke([*messages, first, result]).content == "It is done."


def test_text_is_completed(url, model):
    text = OpenAI(base_url=f"{url}/v1", api_key="unused", model=model, temperature=0, max_tokens=4)
    whole = text.invoke("There is a red")
    assert whole
    assert "".join(text.stream("There is a red")) == whole


def test_errors_are_the_sdks_own(chat, scripted, url):
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        chat_at(url, "gpt-4o").invoke("Hello")
    with pytest.raises(openai.BadRequestError, match="did you mean seed"):
        chat.invoke("Hello", extra_body={"sead": 1})
    with pytest.raises(openai.RateLimitError):
        scripted.invoke("Busy")
    with pytest.raises(openai.APIError, match="engine"):
        list(scripted.stream("Break"))
