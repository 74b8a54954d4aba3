"""Every parameter of the OpenAI SDK is honoured, refused by its name, or known to do nothing.

The SDK's own types say what there is, so that a new parameter fails here first.
"""

import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from openai.types.chat import (
    ChatCompletionContentPartParam,
    ChatCompletionMessage,
    ChatCompletionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolChoiceOptionParam,
    ChatCompletionToolUnionParam,
    completion_create_params,
)
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as TextParams,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsStreaming as TextStreamParams,
)

from vlmserve.server.errors import BadRequestError
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.schemas.openai import chat, completions
from vlmserve.server.schemas.sampling import StreamOptions

TOOL = {"type": "function", "function": {"name": "look"}}
OTHER = {"type": "function", "function": {"name": "listen"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TURN = {"role": "user", "content": "hi"}
CHAT = {"model": "m", "messages": [TURN], "seed": 1}
TEXT = {"model": "m", "prompt": "hi", "seed": 1}

# A value that changes what is generated, with what it needs beside it.
SHARED_CASES = {
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 5},
    "seed": {"seed": 2},
    "stop": {"stop": "a"},
    "stop_token_ids": {"stop_token_ids": [5]},
    "ignore_eos": {"ignore_eos": True},
    "include_stop_str_in_output": {"include_stop_str_in_output": True},
    "no_stop_trim": {"no_stop_trim": True},
    "skip_special_tokens": {"skip_special_tokens": False},
    "allowed_token_ids": {"allowed_token_ids": [1]},
    "bad_words": {"bad_words": ["a"]},
    "return_token_ids": {"return_token_ids": True},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 5},
    "regex": {"regex": "a"},
    "ebnf": {"ebnf": 'root ::= "a"'},
    "json_schema": {"json_schema": "{}"},
    "min_p": {"min_p": 0.5},
    "min_tokens": {"min_tokens": 5},
    "presence_penalty": {"presence_penalty": 1},
    "frequency_penalty": {"frequency_penalty": 1},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "logit_bias": {"logit_bias": {"5": 1}},
    "n": {"n": 2},
    "priority": {"priority": 1},
    "response_format": {"response_format": SCHEMA},
    "guided_json": {"guided_json": {}},
    "guided_regex": {"guided_regex": "a"},
    "guided_choice": {"guided_choice": ["a"]},
    "guided_grammar": {"guided_grammar": 'root ::= "a"'},
    "nvext": {"nvext": {"guided_regex": "a"}},
    "structured_outputs": {"structured_outputs": {"regex": "a"}},
    "timeout_s": {"timeout_s": 5},
    "prompt_logprobs": {"prompt_logprobs": 1},
}
CASES = {
    "chat": SHARED_CASES
    | {
        "messages": {"messages": [TURN, TURN]},
        "max_tokens": {"max_tokens": 5},
        "max_completion_tokens": {"max_completion_tokens": 5},
        "logprobs": {"logprobs": True},
        "top_logprobs": {"logprobs": True, "top_logprobs": 3},
        "tools": {"tools": [TOOL]},
        "tool_choice": {"tools": [TOOL], "tool_choice": "required"},
        "parallel_tool_calls": {"tools": [TOOL], "parallel_tool_calls": False},
        "add_generation_prompt": {"add_generation_prompt": False},
        "continue_final_message": {
            "messages": [TURN, {"role": "assistant", "content": "a"}],
            "continue_final_message": True,
        },
        "chat_template_kwargs": {"chat_template_kwargs": {"a": 1}},
    },
    "completions": SHARED_CASES
    | {
        "prompt": {"prompt": "other"},
        "max_tokens": {"max_tokens": 5},
        "logprobs": {"logprobs": 1},
        "echo": {"echo": True, "logprobs": 1},
        "add_special_tokens": {"add_special_tokens": False},
    },
}
# What the routes do with it is tested with them.
OF_ROUTES = {"model", "return_prompt_token_ids", "stream", "stream_options", "cache_salt"} | {
    "return_timings"
}
# Taken where it asks for nothing that `n` does not.
OF_CHECKS = {"chat": set(), "completions": {"best_of"}}
ASKING = {
    "audio": {"voice": "alloy", "format": "mp3"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "service_tier": "flex",
    "store": True,
    "suffix": "a",
    "verbosity": "high",
    "web_search_options": {},
}
IDLE = {
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "user": "u",
}
MODULES = {"chat": chat, "completions": completions}


def generation_of(api, body):
    schema = chat.ChatCompletionRequest if api == "chat" else completions.CompletionRequest
    decoded = decode_body(json.dumps(body).encode(), schema)
    return (chat.chat_generation if api == "chat" else completions.completion_generation)(decoded)


def base_of(api):
    return CHAT if api == "chat" else TEXT


def refusal_of(api, fields):
    with pytest.raises(BadRequestError) as caught:
        generation_of(api, base_of(api) | fields)
    return caught.value


def sdk_parameters(api):
    if api == "completions":
        return set(get_type_hints(TextParams)) | set(get_type_hints(TextStreamParams))
    module = completion_create_params
    plain = get_type_hints(module.CompletionCreateParamsNonStreaming)
    return set(plain) | set(get_type_hints(module.CompletionCreateParamsStreaming))


def lists_of(api):
    module = MODULES[api]
    honoured = set(CASES[api]) | OF_ROUTES | OF_CHECKS[api]
    return honoured, set(module.REFUSED), set(module.WITHOUT_EFFECT)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_every_parameter_of_the_sdk_is_in_one_of_three_lists(api):
    honoured, refused, idle = lists_of(api)
    assert sdk_parameters(api) - (honoured | refused | idle) == set()
    assert len(honoured) + len(refused) + len(idle) == len(honoured | refused | idle)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_every_field_of_the_schema_is_in_one_of_them_too(api):
    module = MODULES[api]
    schema = module.ChatCompletionRequest if api == "chat" else module.CompletionRequest
    assert set(schema.__struct_fields__) == set.union(*lists_of(api))


@pytest.mark.parametrize(("api", "field"), [(api, field) for api in CASES for field in CASES[api]])
def test_an_honoured_parameter_changes_what_is_generated(api, field):
    body = base_of(api) | CASES[api][field]
    without = {name: value for name, value in body.items() if name != field}
    without |= {field: base_of(api)[field]} if field in base_of(api) else {}
    assert generation_of(api, body) != generation_of(api, without)


REFUSALS = [(api, field) for api in MODULES for field in MODULES[api].REFUSED]


@pytest.mark.parametrize(("api", "field"), REFUSALS)
def test_a_refused_parameter_is_named_and_taken_where_it_is_neutral(api, field):
    error = refusal_of(api, {field: ASKING[field]})
    assert error.param == field
    assert error.message.startswith(f"{field} is not supported")
    for neutral in (None, *MODULES[api].REFUSED[field].values):
        body = base_of(api) | {field: neutral}
        assert generation_of(api, body) == generation_of(api, base_of(api))


@pytest.mark.parametrize(
    ("api", "field"),
    [(api, field) for api in MODULES for field in sorted(MODULES[api].WITHOUT_EFFECT)],
)
def test_a_parameter_without_effect_has_none(api, field):
    body = base_of(api) | {field: IDLE[field]}
    assert generation_of(api, body) == generation_of(api, base_of(api))


def literals_of(union, key):
    """What stands under the key in each member of a union of the SDK's."""
    hints = [get_type_hints(member) for member in get_args(union) if isinstance(member, type)]
    return {value for hint in hints if key in hint for value in get_args(hint[key])}


TURNS = {
    "developer": TURN | {"role": "developer"},
    "system": TURN | {"role": "system"},
    "user": TURN,
    "assistant": TURN | {"role": "assistant"},
    "tool": TURN | {"role": "tool", "tool_call_id": "c"},
    "function": TURN | {"role": "function", "name": "f"},
}
PARTS = {
    "text": {"type": "text", "text": "a"},
    "image_url": IMAGE,
    "input_audio": {"type": "input_audio", "input_audio": {"data": "", "format": "mp3"}},
    "file": {"type": "file", "file": {"file_id": "f"}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def test_every_role_is_taken_but_that_of_functions():
    roles = literals_of(ChatCompletionMessageParam, "role")
    assert roles == set(TURNS)
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    for role in roles - {"function"}:
        generation_of("chat", CHAT | {"messages": [asked, TURNS[role]]})
    error = refusal_of("chat", {"messages": [TURNS["function"]]})
    assert error.param == "messages[0].role"
    assert "function" in error.message


def test_every_kind_of_part_is_taken_or_named():
    kinds = literals_of(ChatCompletionContentPartParam, "type")
    assert kinds == set(PARTS)
    for kind in kinds:
        messages = [{"role": "user", "content": [PARTS[kind]]}]
        if kind in ("text", "image_url"):
            generation_of("chat", CHAT | {"messages": messages})
            continue
        error = refusal_of("chat", {"messages": messages})
        assert error.param == "messages[0].content[0].type"
        assert kind in error.message


@pytest.mark.parametrize("part", ["text", "image_url"])
def test_a_breakpoint_of_openais_cache_is_refused_by_its_name(part):
    breakpoint_ = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    turn = {"role": "user", "content": [PARTS[part] | breakpoint_]}
    error = refusal_of("chat", {"messages": [turn]})
    assert error.param == "messages[0].content[0].prompt_cache_breakpoint"


def test_every_detail_of_an_image_is_taken_or_named():
    details = set(get_args(get_type_hints(ImageURL)["detail"]))
    tiles = {}
    for detail in details:
        part = {"type": "image_url", "image_url": {"url": "u", "detail": detail}}
        messages = [{"role": "user", "content": [part]}]
        if detail == "original":
            param = "messages[0].content[0].image_url.detail"
            assert refusal_of("chat", {"messages": messages}).param == param
            continue
        (message,) = generation_of("chat", CHAT | {"messages": messages}).messages
        tiles[detail] = message.images[0].max_tiles
    assert tiles == {"low": 1, "high": None, "auto": None}


def test_every_stream_option_is_known():
    of_vllm = {"continuous_usage_stats"}
    assert set(get_type_hints(ChatCompletionStreamOptionsParam)) | of_vllm == set(
        StreamOptions.__struct_fields__
    )


def test_every_kind_of_tool_is_taken_or_named():
    kinds = literals_of(ChatCompletionToolUnionParam, "type")
    assert kinds == {"function", "custom"}
    error = refusal_of("chat", {"tools": [{"type": "custom", "custom": {"name": "a"}}]})
    assert error.param == "tools[0].type"


def test_every_tool_choice_is_taken_or_named():
    kinds = literals_of(ChatCompletionToolChoiceOptionParam, "type")
    assert kinds == {"allowed_tools", "function", "custom"}
    custom = {"type": "custom", "custom": {"name": "a"}}
    error = refusal_of("chat", {"tools": [TOOL], "tool_choice": custom})
    assert error.param == "tool_choice.type"


def allowed(mode, *tools):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def test_of_allowed_tools_the_model_is_told_and_no_others():
    body = CHAT | {"tools": [TOOL, OTHER]}
    auto = generation_of("chat", body | {"tool_choice": allowed("auto", OTHER)})
    assert [tool.name for tool in auto.tools] == ["listen"]
    assert auto.grammar is None
    required = generation_of("chat", body | {"tool_choice": allowed("required", TOOL)})
    named = generation_of("chat", body | {"tools": [TOOL], "tool_choice": "required"})
    assert required == named
    both = generation_of("chat", body | {"tool_choice": allowed("auto", TOOL, OTHER)})
    assert both == generation_of("chat", body)


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        (allowed("auto", OTHER), "tool_choice.allowed_tools.tools[0]"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        (allowed("none", TOOL), "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
    ],
)
def test_allowed_tools_that_cannot_be_are_named(choice, param):
    assert refusal_of("chat", {"tools": [TOOL], "tool_choice": choice}).param == param


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "a", "refusal": None, "annotations": []},
        {"role": "assistant", "content": None, "refusal": "a"},
    ],
)
def test_an_answer_as_the_sdk_dumps_it_is_taken_back(answer):
    dumped = ChatCompletionMessage.model_validate(answer).model_dump()
    assert {"refusal", "annotations", "audio", "function_call", "tool_calls"} <= set(dumped)
    for message in (dumped, answer):
        request = generation_of("chat", CHAT | {"messages": [TURN, message, TURN]})
        assert request.messages[1].text == ("" if "tool_calls" in answer else "a")
        assert len(request.messages[1].tool_calls) == len(answer.get("tool_calls") or ())


def test_a_part_that_refuses_is_text_of_the_answer():
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    request = generation_of("chat", CHAT | {"messages": [{"role": "assistant", "content": parts}]})
    assert request.messages[0].text == "ab"
    error = refusal_of("chat", {"messages": [{"role": "user", "content": parts}]})
    assert error.param == "messages[0].content[1].type"


@pytest.mark.parametrize("field", ["audio", "function_call"])
def test_what_an_earlier_answer_cannot_have_held_is_named(field):
    turn = {"role": "assistant", "content": "a", field: {"id": "a", "name": "b"}}
    assert refusal_of("chat", {"messages": [turn]}).param == f"messages[0].{field}"


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "parameters.md").read_text()


def documented(*titles):
    """The fields that the tables of these sections name."""
    names = set()
    for title in titles:
        section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
        rows = re.findall(r"(?m)^\| (`[^|]*?) \|", section)
        names |= {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    return names


def test_the_page_tells_of_every_parameter_in_its_list():
    chat_fields = set(chat.ChatCompletionRequest.__struct_fields__)
    refused, idle = set(chat.REFUSED), set(chat.WITHOUT_EFFECT)
    shared = documented("Both routes")
    assert shared | documented("Chat completions: honoured") == (
        chat_fields - refused - idle | {"user"}
    )
    assert documented("Chat completions: refused") == refused
    assert documented("Chat completions: without effect") == idle
    fields = set(completions.CompletionRequest.__struct_fields__)
    assert shared | documented("Completions") == fields


def test_the_page_tells_at_which_values_refused_fields_are_taken():
    for field, neutral in chat.REFUSED.items():
        (row,) = re.findall(rf"(?m)^\| `{field}` \| (.*?) \|", PAGE)
        values = [v if isinstance(v, str) else json.dumps(v) for v in neutral.values]
        assert row == (", ".join(f"`{value}`" for value in values) or "-")
