"""What SDKs add to an answer's message before they send it back: accepted, without effect."""

import json

import msgspec
import pytest

from vlmserve.server.prompts.conversation import Message, TextPart, ToolCall
from vlmserve.server.schemas.anthropic.requests import MessagesRequest, messages_generation
from vlmserve.server.schemas.decoding import decode_with_names
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation
from vlmserve.server.schemas.openai.responses import ResponsesRequest, responses_generation

TURN = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "Yes."}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
PARSED = {"parsed_arguments": {"a": 1}} | CALL["function"]
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}


def echoed(*turns):
    body = json.dumps({"model": "m", "messages": [TURN, *turns]}).encode()
    decoded = decode_with_names(body, ChatCompletionRequest, "refuse")
    return chat_generation(decoded.value).messages[1:]


@pytest.mark.parametrize(
    "fields",
    [
        {"parsed": {"a": 1}},
        {"parsed": None, "audio": None, "function_call": None, "annotations": [{"type": "x"}]},
        {"invalid_tool_calls": []},
        {"invalid_tool_calls": [{"name": "f", "args": "{", "id": "c", "error": None}]},
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"reasoning": {"effort": "low"}},
        {"provider_specific_fields": {"refusal": None}},
        {"thinking_blocks": [THOUGHT]},
        {"cache_control": {"type": "ephemeral"}},
        {"type": "message"},
        {"content": [{"type": "text", "text": "Yes.", "cache_control": {}, "annotations": []}]},
        {"content": [THOUGHT, {"type": "redacted_thinking", "data": "x"},
                     {"type": "text", "text": "Yes."}]},
    ],
)  # fmt: skip
def test_an_answers_message_is_accepted_with_what_sdks_add(fields):
    """Each of these used to be a 400 that named the field."""
    assert echoed(ANSWER | fields) == (Message("assistant", (TextPart("Yes."),)),)


@pytest.mark.parametrize("fields", [{}, {"tool_calls": []}, {"reasoning_content": "hm"}])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
def test_an_answer_without_text_is_accepted(fields, content):
    """Agents send an empty answer back with a null content, which used to be a 400."""
    assert echoed({"role": "assistant"} | fields | content) == (Message("assistant", ()),)


@pytest.mark.parametrize(
    "fields",
    [
        {"function": PARSED},
        {"index": 0},
        {"provider_specific_fields": {}},
        {"cache_control": {"type": "ephemeral"}},
    ],
)
def test_a_call_is_accepted_with_what_sdks_add(fields):
    (message,) = echoed(CALLING | {"tool_calls": [CALL | fields]})
    assert message == Message("assistant", (), (ToolCall("f", {}),))


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
def test_a_message_of_any_role_has_a_type_and_a_cache_control(role):
    turn = {"role": role, "content": "a", "type": "text", "cache_control": {"type": "ephemeral"}}
    if role == "tool":
        turn["tool_call_id"] = "c1"
    assert echoed(CALLING, turn)[-1].text == "a"


def test_a_picture_part_has_a_cache_control():
    part = {"type": "image_url", "image_url": "u", "cache_control": {"type": "ephemeral"}}
    assert len(echoed({"role": "user", "content": [part]})[0].images) == 1


def test_the_anthropic_sdks_parsed_output_is_accepted():
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a", "parsed_output": {}}]}
    body = {"model": "m", "max_tokens": 1, "messages": [TURN, answer, TURN]}
    decoded = decode_with_names(msgspec.json.encode(body), MessagesRequest, "refuse")
    assert messages_generation(decoded.value).messages[1].text == "a"


def test_a_call_of_the_anthropic_sdk_has_a_caller():
    call = {"type": "tool_use", "id": "c1", "name": "f", "input": {}, "caller": {"type": "direct"}}
    turns = [TURN, {"role": "assistant", "content": [call]}]
    body = {"model": "m", "max_tokens": 1, "messages": turns}
    decoded = decode_with_names(msgspec.json.encode(body), MessagesRequest, "refuse")
    assert messages_generation(decoded.value).messages[1].tool_calls == (ToolCall("f", {}),)


def test_items_of_parsed_responses_are_accepted():
    text = {"type": "output_text", "text": "a", "annotations": [], "parsed": {"b": 1}}
    called = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    items = [
        {"type": "message", "role": "assistant", "content": [text]},
        called | {"parsed_arguments": {}, "caller": {"type": "direct"}},
        {"type": "function_call_output", "call_id": "c1", "output": "x"},
    ]
    body = msgspec.json.encode({"model": "m", "input": [TURN, *items]})
    decoded = decode_with_names(body, ResponsesRequest, "refuse").value
    generation = responses_generation(decoded)
    assert [message.text for message in generation.messages] == ["hi", "a", "x"]
