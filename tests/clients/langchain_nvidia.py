"""LangChain's ChatNVIDIA, as the client of a NIM that runs on one's own machine."""

import asyncio
import enum
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_nvidia_ai_endpoints import NVIDIA, ChatNVIDIA
from pydantic import BaseModel, ConfigDict

pytestmark = pytest.mark.filterwarnings("ignore")


@tool
def turn(to: Literal["left", "right"]) -> str:
    """Turn around."""
    return f"turned {to}"


class Scene(BaseModel):
    """What a picture shows."""

    # The bundled model never saw a schema: without this it would find no end of further keys.
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]
    is_drawn: bool


class Colour(enum.Enum):
    """The colours that may be answered."""

    RED = "red"
    BLUE = "blue"


def chat_at(url, model, key="unused", **fields):
    options = {"temperature": 0, "max_completion_tokens": 64} | fields
    return ChatNVIDIA(base_url=f"{url}/v1", api_key=key, model=model, **options)


@pytest.fixture
def chat(url, model):
    return chat_at(url, model)


@pytest.fixture
def scripted(scripted_url, scripted_model):
    return chat_at(scripted_url, scripted_model, "secret")


def about(picture, question):
    block = {"type": "image_url", "image_url": {"url": picture.url}}
    return HumanMessage([block, {"type": "text", "text": question}])


def whole(chunks):
    chunks = list(chunks)
    return sum(chunks[1:], chunks[0])


def test_the_models_are_listed(chat, model):
    assert [one.id for one in chat.available_models] == [model]


def test_three_turns_about_a_picture_are_answered_plain_and_streamed(chat, shapes):
    (first, answer), (second, _), (third, _), *_ = shapes.answers.items()
    plain, streamed = [about(shapes, first)], [about(shapes, first)]
    for number, question in enumerate((first, second, third)):
        if number:
            plain.append(HumanMessage(question))
            streamed.append(HumanMessage(question))
        reply, of_stream = chat.invoke(plain), whole(chat.stream(streamed))
        assert number or reply.content == answer
        assert of_stream.content == reply.content
        assert of_stream.usage_metadata["output_tokens"] == reply.usage_metadata["output_tokens"]
        plain.append(reply)
        # A chunk is no message that can be sent.
        streamed.append(AIMessage(of_stream.content))


def test_a_picture_in_a_tag_of_a_text_is_seen(chat, shapes):
    # How NIM's own documentation writes it.
    [(question, answer), *_] = shapes.answers.items()
    assert chat.invoke(f'{question} <img src="{shapes.url}" />').content == answer


def test_async_answers_alike(chat, shapes):
    [(question, answer), *_] = shapes.answers.items()

    async def run():
        plain = await chat.ainvoke([about(shapes, question)])
        pieces = [chunk.content async for chunk in chat.astream([about(shapes, question)])]
        return plain.content, "".join(pieces)

    assert asyncio.run(run()) == (answer, answer)


@pytest.mark.parametrize("form", [Scene, Scene.model_json_schema()], ids=["class", "schema"])
def test_structured_output_about_a_picture_is_an_object(chat, shapes, form):
    asked = [about(shapes, "What colour is the circle?")]
    bound = chat.with_structured_output(form)
    reply = bound.invoke(asked)
    assert Scene.model_validate(reply) if isinstance(reply, dict) else isinstance(reply, Scene)
    *_, last = bound.stream(asked)
    assert last == reply


def test_structured_output_is_one_of_an_enum(chat, shapes):
    reply = chat.with_structured_output(Colour).invoke([about(shapes, "What colour is it?")])
    assert isinstance(reply, Colour)


@pytest.mark.parametrize("field", ["guided_json", "guided_choice", "guided_regex"])
def test_nim_s_older_guides_are_obeyed(chat, shapes, field):
    value = {
        "guided_json": Scene.model_json_schema(),
        "guided_choice": ["red", "blue"],
        "guided_regex": "red|blue",
    }[field]
    asked = [about(shapes, "What colour is the circle?")]
    direct = chat.bind(**{field: value}).invoke(asked).content
    assert direct in ("red", "blue") or Scene.model_validate_json(direct)
    assert chat.bind(nvext={field: value}).invoke(asked).content == direct


def test_a_required_tool_is_called_about_a_picture_plain_and_streamed(chat, shapes):
    closed = convert_to_openai_tool(turn, strict=True)
    bound = chat.bind_tools([closed], tool_choice="required")
    asked = [about(shapes, "What is in this image?")]
    bound = bound.bind(parallel_tool_calls=False)
    first = bound.invoke(asked)
    (call,) = first.tool_calls
    assert call["name"] == "turn"
    streamed = whole(bound.stream(asked))
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [
        (call["name"], call["args"])
    ]
    result = ToolMessage("turned", tool_call_id=call["id"])
    assert chat.bind_tools([turn]).invoke([*asked, first, result]).content


def test_calls_go_round(scripted):
    bound = scripted.bind_tools([turn])
    messages = []
    for _ in range(3):
        messages.append(HumanMessage("Call"))
        first = bound.invoke(messages)
        (call,) = first.tool_calls
        assert (call["name"], call["args"]) == ("turn", {"to": "left"})
        messages += [first, turn.invoke(call)]
        answer = bound.invoke(messages)
        assert answer.content == "It is done."
        messages.append(answer)


def test_text_is_completed(url, model):
    text = NVIDIA(base_url=f"{url}/v1", api_key="unused", model=model, temperature=0, max_tokens=4)
    reply = text.invoke("There is a red")
    assert reply
    assert "".join(text.stream("There is a red")) == reply


def test_errors_name_status_and_remedy(chat, scripted, url):
    with pytest.raises(Exception, match="404"):
        chat_at(url, "other").invoke("Hello")
    with pytest.raises(Exception, match="did you mean seed"):
        chat.invoke("Hello", sead=1)
    with pytest.raises(Exception, match="429"):
        scripted.invoke("Busy")
    with pytest.raises(Exception, match="engine"):
        list(scripted.stream("Break"))
