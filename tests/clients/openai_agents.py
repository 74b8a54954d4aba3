"""OpenAI's Agents SDK, over responses and over chat completions."""

import asyncio
import json
from typing import Literal

import openai
import pytest
from agents import (
    Agent,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from pydantic import BaseModel

set_tracing_disabled(True)
# Connections of a client belong to the loop in which they were opened.
LOOP = asyncio.Runner()
GREEDY = ModelSettings(temperature=0, max_tokens=64, include_usage=True)
KINDS = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}


@function_tool
def turn(to: Literal["left", "right"]) -> str:
    """Turn around."""
    return f"turned {to}"


class Scene(BaseModel):
    """What a picture shows."""

    colour: Literal["red", "blue"]
    is_drawn: bool


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def model_at(kind, url, name, key="unused"):
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
    return kind(model=name, openai_client=client)


@pytest.fixture
def seeing(kind, url, model):
    return model_at(kind, url, model)


@pytest.fixture
def scripted(kind, scripted_url, scripted_model):
    return model_at(kind, scripted_url, scripted_model, "secret")


def agent(model, settings=None, **parts):
    # The bundled model was trained without instructions.
    chosen = GREEDY.resolve(settings)
    return Agent(name="Painter", model=model, model_settings=chosen, **parts)


def about(picture, question):
    content = [
        {"type": "input_image", "image_url": picture.url, "detail": "auto"},
        {"type": "input_text", "text": question},
    ]
    return {"role": "user", "content": content}


def run(chosen, asked, **options):
    return LOOP.run(Runner.run(chosen, asked, **options))


def run_streamed(chosen, asked, **options):
    """The result of a streamed run, and the pieces of text that came."""

    async def read():
        result = Runner.run_streamed(chosen, asked, **options)
        pieces = []
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type.endswith("text.delta"):
                pieces.append(event.data.delta)
        return result, "".join(pieces)

    return LOOP.run(read())


def test_three_turns_about_a_picture_are_answered_plain_and_streamed(seeing, shapes):
    painter = agent(seeing)
    (first, answer), (second, _), (third, _), *_ = shapes.answers.items()
    plain, streamed = [about(shapes, first)], [about(shapes, first)]
    for number, question in enumerate((first, second, third)):
        if number:
            plain.append({"role": "user", "content": question})
            streamed.append({"role": "user", "content": question})
        result = run(painter, plain)
        of_stream, pieces = run_streamed(painter, streamed)
        assert pieces == of_stream.final_output == result.final_output
        assert number or result.final_output == answer
        usage = result.context_wrapper.usage
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens > 0
        assert of_stream.context_wrapper.usage.total_tokens == usage.total_tokens
        plain, streamed = result.to_input_list(), of_stream.to_input_list()


def test_a_session_keeps_the_conversation(seeing, shapes):
    session = SQLiteSession("conversation")
    painter = agent(seeing)
    [(first, answer), (second, _), *_] = shapes.answers.items()
    options = {"session": session}
    assert run(painter, [about(shapes, first)], **options).final_output == answer
    kept = run(painter, second, **options).final_output
    echoed = [about(shapes, first), {"role": "assistant", "content": answer}]
    assert run(painter, [*echoed, {"role": "user", "content": second}]).final_output == kept


def test_a_response_continues_the_one_before(url, model, shapes):
    painter = agent(model_at(OpenAIResponsesModel, url, model))
    [(first, answer), (second, _), *_] = shapes.answers.items()
    result = run(painter, [about(shapes, first)])
    assert result.final_output == answer
    echoed = run(painter, [*result.to_input_list(), {"role": "user", "content": second}])
    continued = run(painter, second, previous_response_id=result.last_response_id)
    assert continued.final_output == echoed.final_output


def test_an_answer_about_a_picture_has_the_output_s_type(seeing, shapes):
    painter = agent(seeing, output_type=Scene)
    asked = [about(shapes, "What colour is the circle?")]
    result, pieces = run_streamed(painter, asked)
    assert isinstance(result.final_output, Scene)
    assert Scene.model_validate_json(pieces) == result.final_output
    assert run(painter, asked).final_output == result.final_output


@pytest.mark.parametrize("choice", ["required", "turn"])
def test_a_tool_is_called_about_a_picture(seeing, shapes, choice):
    settings = ModelSettings(tool_choice=choice, parallel_tool_calls=False)
    painter = agent(seeing, settings, tools=[turn], tool_use_behavior="stop_on_first_tool")
    asked = [about(shapes, "What is in this image?")]
    result = run(painter, asked)
    assert result.final_output in ("turned left", "turned right")
    of_stream, _ = run_streamed(painter, asked)
    assert of_stream.final_output == result.final_output
    # The calls and their results go back as they came.
    again = agent(seeing, tools=[turn])
    answer = run(again, [*result.to_input_list(), {"role": "user", "content": "And now?"}])
    assert answer.final_output


def test_calls_go_round_until_an_answer(scripted):
    painter = agent(scripted, tools=[turn])
    asked = [{"role": "user", "content": "Call"}]
    for _ in range(3):
        result = run(painter, asked)
        assert result.final_output == "It is done."
        of_stream, pieces = run_streamed(painter, asked)
        assert of_stream.final_output == pieces == "It is done."
        [call] = [item.raw_item for item in result.new_items if item.type == "tool_call_item"]
        assert (call.name, json.loads(call.arguments)) == ("turn", {"to": "left"})
        asked = [*result.to_input_list(), {"role": "user", "content": "Call"}]


def test_an_agent_hands_the_picture_over_to_another(seeing, shapes):
    [question, *_] = shapes.answers
    seer = agent(seeing)
    first = Agent(
        name="Clerk",
        model=seeing,
        model_settings=GREEDY.resolve(ModelSettings(tool_choice="transfer_to_painter")),
        handoffs=[seer],
    )
    result = run(first, [about(shapes, question)])
    assert result.last_agent is seer
    assert result.final_output


def test_errors_are_the_sdk_s_own(scripted, kind, url):
    with pytest.raises(openai.NotFoundError):
        run(agent(model_at(kind, url, "other")), "Hello")
    with pytest.raises(openai.RateLimitError):
        run(agent(scripted), "Busy")
    with pytest.raises((openai.APIError, ModelBehaviorError), match="engine"):
        run_streamed(agent(scripted), "Break")


def test_comments_that_fill_silence_are_no_events(scripted):
    result, pieces = run_streamed(agent(scripted), "Slow")
    assert result.final_output == pieces == "What is in this image?"
