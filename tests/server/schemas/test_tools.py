"""Tools, calls and results as the two APIs take and refuse them, without a server."""

import json

import pytest

from vlmserve.server.errors import BadRequestError
from vlmserve.server.prompts.conversation import Tool, ToolCall
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.schemas.llama_stack.requests import StackChatRequest, stack_generation
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation

TURN = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}

JSON_OBJECT = {"type": "json_object"}


def generation(**fields):
    body = {"model": "m", "messages": [TURN]} | fields
    return chat_generation(decode_body(json.dumps(body).encode(), ChatCompletionRequest))


def stack(**fields):
    body = {"model_id": "m", "messages": [TURN]} | fields
    return stack_generation(decode_body(json.dumps(body).encode(), StackChatRequest))


def function(**fields):
    return {"type": "function", "function": {"name": "f"} | fields}


def call(arguments="{}", name="f", call_id="1"):
    called = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": called}


def asks(*calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(call_id="1", content="x"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def deep(depth):
    value = {}
    for _ in range(depth):
        value = {"properties": {"a": value}}
    return value


def test_tools_are_taken_as_they_are_described():
    tools = [
        function(description="d", parameters=SCHEMA, strict=True),
        {"type": "function", "function": {"name": "get-Time_2"}},
    ]
    request = generation(tools=tools)
    assert request.tools == (Tool("f", "d", SCHEMA), Tool("get-Time_2"))
    assert (request.tool_format, request.max_tool_calls) == ("json", None)
    assert request.tools[0].definition == function(description="d", parameters=SCHEMA)
    assert request.tools[1].schema["additionalProperties"] is False


def test_no_tools_are_told_of_where_none_may_be_called():
    assert generation(tools=[TOOL], tool_choice="none").tools == ()
    assert len(generation(tools=[TOOL], tool_choice="auto").tools) == 1


def test_parallel_calls_are_one_call_when_refused():
    assert generation(tools=[TOOL], parallel_tool_calls=False).max_tool_calls == 1
    assert generation(tools=[TOOL], parallel_tool_calls=True).max_tool_calls is None


def test_calls_and_results_come_back():
    turns = [TURN, asks(call('{"a": "é"}'), call("", "g", "2")), result("1"), result("2"), TURN]
    messages = generation(messages=turns).messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert messages[1].tool_calls == (ToolCall("f", {"a": "é"}), ToolCall("g", {}))
    assert messages[1].text == ""
    assert messages[2].text == "x"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [asks(call(), content="Wait."), result(content=parts)]
    messages = generation(messages=turns).messages
    assert [message.text for message in messages] == ["Wait.", "ab"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [function(name="")]}, "tools[0].function.name"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(name="a\n")]}, "tools[0].function.name"),
        ({"tools": [function(name="a" * 65)]}, "tools[0].function.name"),
        ({"tools": [function(name="<|eot_id|>")]}, "tools[0].function.name"),
        ({"tools": [function(extra=1)]}, "tools[0].function.extra"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        (
            {"tools": [function(parameters={"type": "string"})]},
            "tools[0].function.parameters",
        ),
        ({"tools": [function(parameters=deep(40))]}, "tools[0].function.parameters"),
        (
            {"tools": [TOOL, function(name="g", parameters={"title": "x" * 65_536})]},
            "tools[1].function.parameters",
        ),
        ({"tools": [TOOL] * 2}, "tools"),
        ({"tools": [function(name="required")]}, "tools"),
        (
            {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"},
            "tool_choice",
        ),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": function(name="g")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [asks(call("[" * 9**5))]}, "messages[0].tool_calls[0].function.arguments"),
        (
            {"messages": [asks(call('{"a":' * 99 + "1" + "}" * 99))]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [asks(call(name="a b"))]}, "messages[0].tool_calls[0].function.name"),
        ({"messages": [TURN, result()]}, "messages[1].tool_call_id"),
        ({"messages": [result(), asks(call())]}, "messages[0].tool_call_id"),
        ({"messages": [asks(call()), result("2")]}, "messages[1].tool_call_id"),
        ({"messages": [asks(call()), result(content="\0")]}, "messages[1].content"),
        ({"messages": [asks(call()), result(content=None)]}, "messages[1].content"),
    ],
)
def test_a_bad_tool_call_or_result_is_named(fields, param):
    with pytest.raises(BadRequestError) as caught:
        generation(**fields)
    assert caught.value.param == param


def test_the_fields_that_tools_replaced_say_so_and_are_taken_at_neutral_values():
    for field, newer in (("functions", "tools"), ("function_call", "tool_choice")):
        with pytest.raises(BadRequestError, match=f"use {newer}"):
            generation(**{field: [{"name": "f"}] if field == "functions" else {"name": "f"}})
    generation(functions=[], function_call="auto")
    generation(functions=None, function_call="none")
    generation(tools=[], tool_choice="auto")
    generation(tools=None, tool_choice=None)


# Llama Stack

STACK_TOOL = {
    "tool_name": "f",
    "description": "d",
    "parameters": {
        "a": {"param_type": "str", "description": "x", "required": True, "default": None},
        "b": {"param_type": "list[int]", "required": False, "default": [1]},
        "c": {"param_type": "anything"},
    },
}


def with_parameter(parameter):
    return {"tool_name": "f", "parameters": {"a": parameter}}


def calling(role, arguments):
    calls = [{"tool_name": "f", "arguments": arguments}]
    return {"role": role, "content": "", "tool_calls": calls}


def test_llama_stacks_parameters_become_a_schema():
    (tool,) = stack(tools=[STACK_TOOL]).tools
    assert tool == Tool(
        "f",
        "d",
        {
            "type": "object",
            "properties": {
                "a": {"type": "string", "description": "x"},
                "b": {"type": "array", "default": [1]},
                "c": {},
            },
            "required": ["a", "c"],
            "additionalProperties": False,
        },
    )


def test_llama_stack_takes_the_older_and_the_newer_place_of_a_setting():
    for fields, expected in (
        ({}, "json"),
        ({"tool_prompt_format": "function_tag"}, "function_tag"),
        ({"tool_config": {"tool_prompt_format": "python_list"}}, "python_list"),
        (
            {"tool_prompt_format": "json", "tool_config": {"tool_prompt_format": "python_list"}},
            "python_list",
        ),
        ({"tool_config": {"tool_choice": None, "system_message_behavior": "append"}}, "json"),
    ):
        assert stack(tools=[STACK_TOOL], **fields).tool_format == expected
    assert stack(tools=[STACK_TOOL], tool_config={"tool_choice": "none"}).tools == ()
    assert stack(tools=[STACK_TOOL], tool_choice="none").tools == ()


def test_llama_stack_takes_calls_and_results_back():
    calls = [
        {"call_id": "1", "tool_name": "f", "arguments": {"a": [1]}},
        {"call_id": "2", "tool_name": "f", "arguments": '{"a": 2}', "arguments_json": "{}"},
    ]
    turns = [
        TURN,
        {"role": "assistant", "content": "", "stop_reason": "end_of_turn", "tool_calls": calls},
        {"role": "ipython", "call_id": "1", "tool_name": "f", "content": "x"},
        {"role": "tool", "call_id": "2", "content": [{"type": "text", "text": "y"}]},
    ]
    messages = stack(messages=turns).messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool"]
    assert messages[1].tool_calls == (ToolCall("f", {"a": [1]}), ToolCall("f", {"a": 2}))
    assert [message.text for message in messages[2:]] == ["x", "y"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [STACK_TOOL] * 2}, "tools"),
        ({"tools": [with_parameter({})]}, "tools[0].parameters[...].param_type"),
        (
            {"tools": [with_parameter({"param_type": "str", "default": deep(40)})]},
            "tools[0].parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [STACK_TOOL], "tool_choice": "g"}, "tool_choice"),
        (
            {"tool_choice": "none", "tool_config": {"tool_choice": "auto"}},
            "tool_config.tool_choice",
        ),
        ({"tool_prompt_format": "xml"}, "tool_prompt_format"),
        (
            {"tool_config": {"system_message_behavior": "replace"}},
            "tool_config.system_message_behavior",
        ),
        (
            {"messages": [calling("user", {})]},
            "messages[0].tool_calls",
        ),
        (
            {"messages": [calling("assistant", '{"a":' * 99 + "1" + "}" * 99)]},
            "messages[0].tool_calls[0].arguments",
        ),
        (
            {"messages": [{"role": "tool", "content": {"type": "image", "data": "QQ=="}}]},
            "messages[0].content",
        ),
    ],
)
def test_llama_stack_names_a_bad_tool_call_or_result(fields, param):
    with pytest.raises(BadRequestError) as caught:
        stack(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "written", ["[]", "{", '{"a": NaN}', '{"city": "Zür', "7", "not JSON", " "]
)
def test_arguments_that_are_no_json_object_stay_as_the_model_wrote_them(written):
    """They used to be a 400: a conversation ended at the model's own, or a cut, call."""
    (message,) = generation(messages=[asks(call(written))]).messages
    assert message.tool_calls == (ToolCall("f", written),)
    (message,) = stack(messages=[calling("assistant", written)]).messages
    assert message.tool_calls == (ToolCall("f", written),)
