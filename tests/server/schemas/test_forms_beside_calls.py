"""A form of the text beside a tool_choice that asks for calls: such an answer has no text."""

import json

import llguidance
import pytest

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.server.errors import BadRequestError
from vlmserve.server.schemas.anthropic.requests import MessagesRequest, messages_generation
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.schemas.llama_stack.requests import StackChatRequest, stack_generation
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation
from vlmserve.server.schemas.openai.responses import ResponsesRequest, responses_generation

TURN = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
OF_RESPONSES = {"type": "json_schema", "name": "x", "schema": SCHEMA}
# Type, generation, a body that asks for calls, and forms of its text.
APIS = {
    "chat": (
        ChatCompletionRequest,
        chat_generation,
        {"model": "m", "messages": [TURN], "tools": [CHAT_TOOL], "tool_choice": "required"},
        [
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        ],
    ),
    # instructor's mode RESPONSES_TOOLS sends both.
    "responses": (
        ResponsesRequest,
        responses_generation,
        {
            "model": "m",
            "input": "hi",
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
            "tool_choice": {"type": "function", "name": "f"},
        },
        [{"text": {"format": OF_RESPONSES}}, {"text": {"format": {"type": "json_object"}}}],
    ),
    "messages": (
        MessagesRequest,
        messages_generation,
        {
            "model": "m",
            "max_tokens": 9,
            "messages": [TURN],
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any"},
        },
        [{"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}],
    ),
    "stack": (
        StackChatRequest,
        stack_generation,
        {
            "model_id": "m",
            "messages": [TURN],
            "tools": [{"tool_name": "f", "parameters": {"a": {"param_type": "string"}}}],
            "tool_choice": "required",
        },
        [{"response_format": {"type": "json_schema", "json_schema": SCHEMA}}],
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    return llguidance.LLTokenizer(str(CHECKPOINT / "tokenizer.json"))


def takes(tokenizer, grammar, text):
    """Whether the text is a whole one of the grammar's."""
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert matcher.get_error() == ""
    token_ids = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def generation(api, **fields):
    schema, make, body, _ = APIS[api]
    return make(decode_body(json.dumps(body | fields).encode(), schema))


@pytest.mark.parametrize("api", APIS)
def test_calls_that_must_come_have_no_form_of_a_text(api):
    calls = generation(api)
    assert calls.grammar_field == "tool_choice"
    for form in APIS[api][3]:
        both = generation(api, **form)
        assert (both.grammar, both.grammar_field) == (calls.grammar, "tool_choice")


@pytest.mark.parametrize("guided", [{"guided_regex": "a"}, {"structured_outputs": {"regex": "a"}}])
def test_a_guided_form_of_the_whole_answer_cannot_stand_beside_calls(guided):
    with pytest.raises(BadRequestError, match="both set the form") as caught:
        generation("chat", **guided)
    assert caught.value.param == "tool_choice"


def may_call(api):
    tool_choice = {"type": "auto"} if api == "messages" else "auto"
    return {"tool_choice": tool_choice}


@pytest.mark.parametrize("api", APIS)
def test_a_model_that_may_call_answers_with_a_call_or_with_the_form(api, tokenizer):
    """Regression: an agent with an output type and tools could never call one."""
    for fields in APIS[api][3]:
        request = generation(api, **may_call(api), **fields)
        assert not request.grammar_field.startswith("tool")
        call = '{"name": "f", "parameters": {"a": "x"}}'
        for text in (call, '{"a": "x"}'):
            assert takes(tokenizer, request.grammar, text), (fields, text)
        for text in ("a word", '["a"]', f'{call}; {{"a": "x"}}'):
            assert not takes(tokenizer, request.grammar, text), (fields, text)


@pytest.mark.parametrize("api", APIS)
def test_only_the_schema_of_the_form_can_fail_to_compile(api):
    request = generation(api, **may_call(api), **APIS[api][3][0])
    assert [field for _, field in request.grammar_parts] == [request.grammar_field]


def test_without_a_form_or_with_another_kind_of_form_auto_stays_as_it_is():
    assert generation("chat", **may_call("chat")).grammar is None
    guided = generation("chat", **may_call("chat"), guided_regex="a")
    assert guided.grammar_field == "guided_regex"
    assert guided.grammar_parts == ()


def test_references_within_the_schemas_and_names_that_both_have_are_kept_apart(tokenizer):
    shared = {
        "type": "object",
        "properties": {"name": {"$ref": "#/$defs/x"}, "next": {"$ref": "#"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    answer = shared | {"$defs": {"x": {"enum": ["fred", "g"]}}}
    form = {"type": "json_schema", "json_schema": {"schema": answer}}
    fields = {"response_format": form, **may_call("chat")}
    grammar = generation("chat", **fields).grammar
    for text in (
        '{"name": "fred", "next": {"name": "g"}}',
        '{"name": "f", "parameters": {"name": 1, "next": {"x": [2]}}}',
        '{"name": "f", "parameters": {}}',
    ):
        assert takes(tokenizer, grammar, text), text
    for text in ('{"name": "f"}', '{"name": "f", "parameters": 1}', '{"name": 1}'):
        assert not takes(tokenizer, grammar, text), text
