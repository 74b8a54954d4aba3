"""instructor in its modes TOOLS and JSON_SCHEMA, and over responses, about pictures."""

from typing import Literal

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException
from pydantic import BaseModel, ConfigDict, Field

MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA]
QUESTION = "What colour is the circle?"


class Shape(BaseModel):
    """One shape of a picture."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]
    is_round: bool


class Scene(BaseModel):
    """What a picture shows."""

    # The bundled model never saw a schema: without this it would find no end of further keys.
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"] = Field(description="The colour of the circle")
    count: Literal[1, 2, 3]
    other: Shape | None


def patched(url, mode, key="unused"):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
    return instructor.from_openai(client, mode=mode)


@pytest.fixture(params=MODES, ids=lambda mode: mode.name)
def client(request, url):
    return patched(url, request.param)


def pictures(picture):
    """The picture as OpenAI's part and as instructor's own."""
    return [
        {"type": "image_url", "image_url": {"url": picture.url}},
        instructor.Image.from_base64(picture.url),
    ]


def greedy(model, messages, **fields):
    call = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 128}
    return call | {"max_retries": 0, "response_model": Scene} | fields


@pytest.mark.parametrize("form", [0, 1])
def test_a_picture_becomes_an_object(client, model, shapes, form):
    content = [pictures(shapes)[form], {"type": "text", "text": QUESTION}]
    scene = client.create(**greedy(model, [{"role": "user", "content": content}]))
    assert isinstance(scene, Scene)


def test_an_object_of_a_stream_grows_to_the_plain_one(client, model, shapes):
    content = [pictures(shapes)[0], {"type": "text", "text": QUESTION}]
    call = greedy(model, [{"role": "user", "content": content}])
    *_, last = client.create_partial(**call)
    assert last.model_dump() == client.create(**call).model_dump()


def test_several_objects_of_one_answer_are_iterated(client, model, shapes):
    # A list in the model, where the small model would find no end.
    class Answers(BaseModel):
        model_config = ConfigDict(extra="forbid")
        tasks: list[Shape] = Field(min_length=1, max_length=2)

    content = [pictures(shapes)[0], {"type": "text", "text": QUESTION}]
    call = greedy(model, [{"role": "user", "content": content}], response_model=Answers)
    assert 1 <= len(client.create(**call).tasks) <= 2


def test_three_turns_echo_the_raw_answers(client, model, shapes):
    messages = []
    for number, question in enumerate(list(shapes.answers)[:3]):
        text = {"type": "text", "text": question}
        content = question if number else [pictures(shapes)[0], text]
        messages.append({"role": "user", "content": content})
        scene, raw = client.create_with_completion(**greedy(model, messages))
        assert isinstance(scene, Scene)
        message = raw.choices[0].message
        messages.append(message.model_dump())
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": "seen"}
            for call in message.tool_calls or ()
        ]


def test_what_fails_validation_is_asked_again_with_its_own_words(client, model, shapes):
    class Picky(Scene):
        count: Literal[1, 2, 3] = Field(ge=4)

    content = [pictures(shapes)[0], {"type": "text", "text": QUESTION}]
    call = greedy(model, [{"role": "user", "content": content}], response_model=Picky)
    with pytest.raises(InstructorRetryException) as caught:
        client.create(**call | {"max_retries": 2})
    # Both tries were answered; it is instructor that found them wanting.
    assert caught.value.n_attempts >= 2
    assert "count" in str(caught.value)


def test_a_cut_answer_is_told(client, model, shapes):
    content = [pictures(shapes)[0], {"type": "text", "text": QUESTION}]
    with pytest.raises(Exception, match=r"(?i)incomplete|max_tokens"):
        client.create(**greedy(model, [{"role": "user", "content": content}], max_tokens=3))


def test_responses_hold_the_form_too(url, model, shapes):
    client = patched(url, instructor.Mode.RESPONSES_TOOLS)
    content = [
        {"type": "input_image", "image_url": shapes.url},
        {"type": "input_text", "text": QUESTION},
    ]
    asked = [{"role": "user", "content": content}]
    scene = client.responses.create(
        model=model, input=asked, temperature=0, max_output_tokens=128, response_model=Scene
    )
    assert isinstance(scene, Scene)


def test_errors_are_the_sdk_s_own(scripted_url, scripted_model, model, url):
    # The scripted server's tokenizer takes no grammars, so the form is asked for in words.
    client = patched(scripted_url, instructor.Mode.MD_JSON, "secret")
    with pytest.raises(InstructorRetryException, match="queue is full"):
        client.create(**greedy(scripted_model, [{"role": "user", "content": "Busy"}]))
    with pytest.raises(InstructorRetryException, match="did you mean seed"):
        patched(url, instructor.Mode.TOOLS).create(
            **greedy(model, [{"role": "user", "content": "Hello"}], extra_body={"sead": 1})
        )
