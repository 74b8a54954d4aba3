"""Anthropic's SDK against the bundled model and a scripted engine."""

import base64
import json

import anthropic
import pytest

TOOL = {
    "name": "turn",
    "description": "Turn around",
    "input_schema": {
        "type": "object",
        "properties": {"to": {"enum": ["left", "right"]}},
        "required": ["to"],
        "additionalProperties": False,
    },
}


def client_at(url, key="unused", **options):
    return anthropic.Anthropic(
        base_url=url, api_key=key, timeout=120, **({"max_retries": 0} | options)
    )


@pytest.fixture
def client(url):
    with client_at(url) as made:
        yield made


@pytest.fixture
def scripted(scripted_url):
    with client_at(scripted_url, "secret") as made:
        yield made


def image(picture):
    media, _, data = picture.url.removeprefix("data:").partition(";base64,")
    base64.b64decode(data, validate=True)
    return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}


def about(picture, question):
    content = [image(picture), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def greedy(model, messages, **fields):
    # The SDK of today names no temperature; the server takes one.
    body = {"extra_body": {"temperature": 0}}
    return {"model": model, "messages": messages, "max_tokens": 48} | body | fields


def test_a_picture_is_described_truly_plain_and_streamed(client, model, shapes):
    for question, answer in shapes.answers.items():
        call = greedy(model, about(shapes, question))
        plain = client.messages.create(**call)
        assert plain.content[0].text == answer
        assert (plain.role, plain.stop_reason) == ("assistant", "end_turn")
        with client.messages.stream(**call) as stream:
            assert "".join(stream.text_stream) == answer
            final = stream.get_final_message()
        assert final.content[0].text == answer
        assert final.usage.output_tokens == plain.usage.output_tokens


def test_an_answer_echoed_for_three_turns_continues_the_conversation(client, model, shapes):
    messages = []
    for question, answer in list(shapes.answers.items())[:3]:
        turn = about(shapes, question)[0] if not messages else {"role": "user", "content": question}
        messages.append(turn)
        reply = client.messages.create(**greedy(model, messages))
        assert reply.stop_reason == "end_turn"
        if len(messages) == 1:
            assert reply.content[0].text == answer
        messages.append({"role": "assistant", "content": reply.content})


def test_tokens_are_counted_as_usage_counts_them(client, model, shapes):
    [question, *_] = shapes.answers
    messages = about(shapes, question)
    counted = client.messages.count_tokens(model=model, messages=messages)
    usage = client.messages.create(**greedy(model, messages)).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_an_answer_can_be_held_to_a_schema(client, model, shapes):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}},
              "required": ["colour"], "additionalProperties": False}  # fmt: skip
    [question, *_] = shapes.answers
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    answer = client.messages.create(**greedy(model, about(shapes, question), output_config=wanted))
    assert json.loads(answer.content[0].text)["colour"] in ("red", "blue")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_pictures_tools_and_forms_take_turns(client, model, shapes, is_streamed):
    """Every turn sends back all answers so far: a text, a call about the picture, an object."""

    def ask(**call):
        if not is_streamed:
            return client.messages.create(**call)
        with client.messages.stream(**call) as stream:
            return stream.get_final_message()

    [question, *_] = shapes.answers
    messages = about(shapes, question)
    text = ask(**greedy(model, messages))
    assert text.content[0].text == shapes.answers[question]
    messages += [
        {"role": "assistant", "content": text.content},
        {"role": "user", "content": "Turn"},
    ]
    choice = {"type": "any", "disable_parallel_tool_use": True}
    call = ask(**greedy(model, messages, tools=[TOOL], tool_choice=choice))
    assert call.stop_reason == "tool_use"
    [block] = call.content
    assert block.input["to"] in ("left", "right")
    result = [{"type": "text", "text": "turned"}, image(shapes)]
    messages += [
        {"role": "assistant", "content": call.content},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": block.id, "content": result},
            {"type": "text", "text": "And now?"},
        ]},
    ]  # fmt: skip
    schema = {"type": "object", "properties": {"seen": {"enum": ["a circle", "a square"]}},
              "required": ["seen"], "additionalProperties": False}  # fmt: skip
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    form = {"output_config": wanted, "tools": [TOOL], "tool_choice": {"type": "none"}}
    answer = ask(**greedy(model, messages, **form))
    assert json.loads(answer.content[0].text)["seen"] in ("a circle", "a square")
    messages.append({"role": "assistant", "content": answer.content})
    messages.append({"role": "user", "content": question})
    assert ask(**greedy(model, messages)).stop_reason == "end_turn"


def test_an_answer_that_the_client_begins_is_continued(client, model, shapes):
    [question, *_] = shapes.answers
    whole = shapes.answers[question]
    start = whole[: whole.index(" ", 8)]
    messages = [*about(shapes, question), {"role": "assistant", "content": start}]
    for_prefill = greedy(model, messages)
    assert start + client.messages.create(**for_prefill).content[0].text == whole
    with client.messages.stream(**for_prefill) as stream:
        assert start + "".join(stream.text_stream) == whole


def test_calls_and_results_go_round_plain_and_streamed(scripted, scripted_model):
    messages = [{"role": "user", "content": "Call"}]
    call = {"model": scripted_model, "max_tokens": 64, "tools": [TOOL]}
    plain = scripted.messages.create(messages=messages, **call)
    assert plain.stop_reason == "tool_use"
    [block] = plain.content
    assert (block.name, block.input) == ("turn", {"to": "left"})
    with scripted.messages.stream(messages=messages, **call) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[0].input == {"to": "left"}
    messages += [
        {"role": "assistant", "content": plain.content},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": block.id, "content": "turned"},
        ]},
    ]  # fmt: skip
    answer = scripted.messages.create(messages=messages, **call)
    assert answer.content[0].text == "It is done."


def test_errors_are_the_sdk_s_own_classes(client, scripted, scripted_model, scripted_url, model):
    turn = [{"role": "user", "content": "What"}]
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=4, messages=turn)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model=model, max_tokens=0, messages=turn)
    with client_at(scripted_url, "wrong") as wrong, pytest.raises(anthropic.AuthenticationError):
        wrong.messages.create(model=scripted_model, max_tokens=4, messages=turn)
    busy = [{"role": "user", "content": "Busy"}]
    with pytest.raises(anthropic.RateLimitError) as caught:
        scripted.messages.create(model=scripted_model, max_tokens=4, messages=busy)
    assert caught.value.response.headers["retry-after"] == "2"


def test_a_stream_that_breaks_raises_and_comments_are_passed_over(scripted, scripted_model):
    slow = [{"role": "user", "content": "Slow"}]
    with scripted.messages.stream(model=scripted_model, max_tokens=64, messages=slow) as stream:
        assert "".join(stream.text_stream) == "What is in this image?"
    broken = [{"role": "user", "content": "Break"}]
    with (
        pytest.raises(anthropic.APIStatusError),
        scripted.messages.stream(model=scripted_model, max_tokens=64, messages=broken) as stream,
    ):
        stream.until_done()
