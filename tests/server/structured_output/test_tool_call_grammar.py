"""Answers that must be calls: what the grammar takes, the parser reads as calls."""

import json

import llguidance
import pytest

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.server.errors import BadRequestError
from vlmserve.server.generation.tool_calls.parser import ToolCallParser
from vlmserve.server.generation.tool_calls.pieces import CallPiece
from vlmserve.server.prompts.conversation import Tool
from vlmserve.server.structured_output.tool_call_grammar import MAX_CALLS, calls_grammar

WEATHER = Tool(
    "get_weather",
    'a // <|eot_id|> " comment',
    {
        "properties": {
            "city": {"type": "string", "description": '<b> /x/ // " \\ %json'},
            "days": {"$ref": "#/$defs/days"},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"days": {"type": "integer", "minimum": 1}},
    },
)
TIME = Tool("get_time")


@pytest.fixture(scope="module")
def tokenizer():
    return llguidance.LLTokenizer(str(CHECKPOINT / "tokenizer.json"))


def takes(tokenizer, grammar, text):
    """Whether the text is a whole one of the grammar's."""
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert matcher.get_error() == ""
    token_ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def calls_in(text):
    """What the parser finds, all of it calls."""
    parser = ToolCallParser([WEATHER.name, TIME.name])
    pieces = [*parser.push(text), *parser.flush()]
    assert all(isinstance(piece, CallPiece) for piece in pieces)
    return [
        (
            piece.name,
            json.loads("".join(one.arguments for one in pieces if one.index == piece.index)),
        )
        for piece in pieces
        if piece.name is not None
    ]


def json_call(name, arguments):
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def test_calls_to_any_of_the_tools_are_taken_and_read(tokenizer):
    grammar = calls_grammar([WEATHER, TIME], None)
    one, other = (
        json_call("get_weather", '{ "city":"Zürich", "days": 2}'),
        json_call("get_time", "{}"),
    )
    for text, calls in (
        (one, [("get_weather", {"city": "Zürich", "days": 2})]),
        (f"{other}; {one}", [("get_time", {}), ("get_weather", {"city": "Zürich", "days": 2})]),
        ("; ".join([other] * MAX_CALLS), [("get_time", {})] * MAX_CALLS),
    ):
        assert takes(tokenizer, grammar, text)
        assert calls_in(text) == calls
    assert not takes(tokenizer, grammar, "; ".join([other] * (MAX_CALLS + 1)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is hot.",
        json_call("get_money", "{}"),
        json_call("get_weather", "{}"),
        json_call("get_weather", '{"city": 1}'),
        json_call("get_weather", '{"city": "a", "days": 0}'),
        json_call("get_weather", '{"city": "a", "more": 0}'),
        json_call("get_time", '{"zone": "CET"}'),
        json_call("get_time", "{}") + " ",
        json_call("get_time", "{}") + json_call("get_time", "{}"),
    ],
)
def test_nothing_else_is_taken(tokenizer, text):
    assert not takes(tokenizer, calls_grammar([WEATHER, TIME], None), text)


def test_one_call_is_one(tokenizer):
    call = json_call("get_time", "{}")
    grammar = calls_grammar([TIME], 1)
    assert takes(tokenizer, grammar, call)
    assert not takes(tokenizer, grammar, f"{call}; {call}")


def test_calls_are_tags_where_the_prompt_asks_for_tags(tokenizer):
    grammar = calls_grammar([WEATHER, TIME], None, "function_tag")
    text = '<function=get_time>{}</function>\n<function=get_weather>{"city": "<"}</function>'
    assert takes(tokenizer, grammar, text)
    assert calls_in(text) == [("get_time", {}), ("get_weather", {"city": "<"})]
    assert not takes(tokenizer, grammar, json_call("get_time", "{}"))


def test_schemas_that_are_too_long_together_or_use_our_key_are_refused():
    long = [Tool(f"f{i}", None, {"title": "x" * 30_000}) for i in range(3)]
    for tools in (long, [Tool("f", None, {"x-guidance": {}})]):
        with pytest.raises(BadRequestError) as caught:
            calls_grammar(tools, None)
        assert caught.value.param == "tools"
