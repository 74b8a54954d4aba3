"""Errors about enums and parts: what is taken, and what to do instead."""

import json
from typing import Literal

import msgspec
import pytest

from vlmserve.server.errors import BadRequestError
from vlmserve.server.schemas.allowed_values import choice_at
from vlmserve.server.schemas.anthropic.requests import MessagesRequest
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.schemas.llama_stack.requests import StackChatRequest
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation
from vlmserve.server.schemas.openai.responses import ResponsesRequest

TURN = {"role": "user", "content": "a"}
CHAT = {"model": "m", "messages": [TURN]}
MESSAGES = CHAT | {"max_tokens": 1}
RESPONSES = {"model": "m", "input": "a"}


def error_of(schema, body):
    with pytest.raises(BadRequestError) as caught:
        decode_body(json.dumps(body).encode(), schema)
    return caught.value


def part(role, kind):
    return {"role": role, "content": [{"type": kind, "text": "a"}]}


@pytest.mark.parametrize(
    ("schema", "body", "message"),
    [
        (
            ChatCompletionRequest,
            CHAT | {"messages": [TURN | {"role": "function"}]},
            'messages[0].role is "function": send "system", "developer", "user", "assistant" or'
            ' "tool". The result of a call has the role "tool"',
        ),
        (
            ChatCompletionRequest,
            CHAT | {"messages": [part("system", "image_url")]},
            'messages[0].content[0].type is "image_url": send "text". Images belong in messages of'
            " the role user",
        ),
        (
            ChatCompletionRequest,
            CHAT | {"messages": [part("assistant", "image_url")]},
            'messages[0].content[0].type is "image_url": send "text", "refusal", "thinking" or'
            ' "redacted_thinking". Images belong in messages of the role user',
        ),
        (
            ChatCompletionRequest,
            CHAT | {"messages": [TURN, part("user", "input_audio")]},
            'messages[1].content[0].type is "input_audio": send "text" or "image_url". This model'
            " does not hear",
        ),
        (
            ChatCompletionRequest,
            CHAT | {"tool_choice": "any"},
            'tool_choice is "any": send "none", "auto", "required" or an object',
        ),
        (
            ChatCompletionRequest,
            CHAT | {"response_format": {}},
            'response_format.type is required: send "text", "json_object" or "json_schema"',
        ),
        (
            ChatCompletionRequest,
            CHAT | {"messages": [{"role": 5}]},
            'messages[0].role is 5: send "system", "developer", "user", "assistant" or "tool"',
        ),
        (
            MessagesRequest,
            MESSAGES | {"tools": [{"name": "a", "input_schema": {}, "type": "bash_20250124"}]},
            'tools[0].type is "bash_20250124": send "custom". This server runs no tools',
        ),
        (
            MessagesRequest,
            MESSAGES | {"messages": [TURN | {"role": "system"}]},
            'messages[0].role is "system": send "user" or "assistant". Its text goes into the field'
            " system",
        ),
        (
            ResponsesRequest,
            RESPONSES | {"tools": [{"type": "web_search"}]},
            'tools[0].type is "web_search": send "function". This server runs no tools',
        ),
        (
            ResponsesRequest,
            RESPONSES | {"input": [part("user", "text")]},
            'input[0].content[0].type is "text": send "input_text", "input_image", "output_text" or'
            ' "refusal". A text is input_text in input, and output_text in an answer',
        ),
        (
            StackChatRequest,
            CHAT | {"sampling_params": {"strategy": {"type": "beam"}}},
            'sampling_params.strategy.type is "beam": send "greedy", "top_p" or "top_k"',
        ),
    ],
)
def test_an_error_lists_what_is_taken(schema, body, message):
    """It used to be `Invalid enum value 'any'`."""
    assert error_of(schema, body).message == message


def test_a_long_value_is_cut():
    error = error_of(ChatCompletionRequest, CHAT | {"tool_choice": "a" * 10_000})
    assert len(error.message) < 200


def test_a_refused_field_lists_the_values_that_it_may_have():
    body = decode_body(json.dumps(CHAT | {"service_tier": "flex"}).encode(), ChatCompletionRequest)
    with pytest.raises(BadRequestError, match='It may be "auto" or "default"'):
        chat_generation(body)


class Inner(msgspec.Struct):
    kind: Literal["a", "b"] | str
    other: Literal["c"] | list[int] | None = None


class Outer(msgspec.Struct):
    by_name: dict[str, Inner]


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("by_name[...].other", 'send "c" or a list'),
        ("by_name[...].kind", None),
        ("by_name[...]", None),
        ("by_name", None),
        ("nothing.here[3]", None),
    ],
)
def test_only_a_place_of_a_few_values_is_a_choice(path, remedy):
    choice = choice_at(Outer, {"by_name": {}}, path)
    assert (choice and choice.remedy) == remedy
