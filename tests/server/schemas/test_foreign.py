"""What routers, benchmarks and agents send beside the API: neutral, honoured or reported."""

import json
import re
from pathlib import Path

import pytest

from vlmserve.server.errors import BadRequestError
from vlmserve.server.schemas.anthropic.requests import MessagesRequest, messages_generation
from vlmserve.server.schemas.decoding import REJECTED, decode_with_names
from vlmserve.server.schemas.foreign import ANY, FOREIGN, FOREIGN_ELSEWHERE
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest, chat_generation
from vlmserve.server.schemas.openai.completions import CompletionRequest, completion_generation
from vlmserve.server.schemas.openai.responses import ResponsesRequest, responses_generation
from vlmserve.server.telemetry.usual_fields import USUAL_FOREIGN_FIELDS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "parameters.md"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
APIS = {
    "chat": (ChatCompletionRequest, chat_generation, CHAT),
    "completions": (CompletionRequest, completion_generation, TEXT),
}
OTHER_APIS = {
    "responses": (ResponsesRequest, {"model": "m", "input": "hi"}),
    "messages": (MessagesRequest, CHAT | {"max_tokens": 1}),
}
# As sglang-router 0.3 and vllm-router 0.1 write every request.
OF_ROUTERS = {
    "no_stop_trim": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "ignore_eos": False,
    "return_hidden_states": False,
    "top_k": 0,
    "min_p": None,
    "session_params": None,
    "lora_path": None,
    "rid": "abc",
}


def decoded(api, fields, unknown="refuse"):
    schema, generation, base = APIS[api]
    body = decode_with_names(json.dumps(base | {"seed": 1} | fields).encode(), schema, unknown)
    return generation(body.value), body.unknown_fields


@pytest.mark.parametrize("api", APIS)
def test_what_routers_add_to_every_request_changes_nothing(api):
    """Behind either router every request used to be a 400."""
    fields = OF_ROUTERS
    assert decoded(api, fields) == decoded(api, {})


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_field_is_absent_at_its_neutral_values_and_else_reported(api, name):
    known = set(APIS[api][0].__struct_fields__)
    for value in FOREIGN[name]:
        plain = decoded(api, {name: "x" if value is ANY else value})
        assert name in known or plain == decoded(api, {})
    # Rejected by name: its own test is test_row_22.
    if name not in known and ANY not in FOREIGN[name] and name not in REJECTED:
        _, names = decoded(api, {name: {"other": "value"}}, "report")
        assert names == [name]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("name", "value"), [("use_beam_search", 0), ("best_of", True), ("length_penalty", 1.5)]
)
def test_a_value_that_only_looks_neutral_is_reported(api, name, value):
    if name not in APIS[api][0].__struct_fields__:
        assert decoded(api, {name: value}, "report")[1] == [name]


def test_a_whole_float_is_the_same_number():
    assert decoded("chat", {"length_penalty": 1.0}) == decoded("chat", {})


def test_every_foreign_field_has_a_label_and_a_row_on_the_page():
    assert set(FOREIGN) <= USUAL_FOREIGN_FIELDS
    rows = re.search(r"(?s)## What other servers' clients send\n.*?(?=\n## |\Z)", PAGE.read_text())
    assert rows is not None
    listed = set(re.findall(r"`([a-z_]+)`", rows[0]))
    assert set(FOREIGN) <= listed


@pytest.mark.parametrize("api", APIS)
def test_top_k_0_is_off_and_top_p_0_is_greedy(api):
    assert decoded(api, {"top_k": 0}) == decoded(api, {"top_k": -1})
    greedy = decoded(api, {"top_p": 0, "temperature": 0.7})[0].sampling
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", ["no_stop_trim", "include_stop_str_in_output"])
def test_a_stop_string_is_kept_where_asked(api, name):
    assert decoded(api, {name: True})[0].text.keeps_stop
    assert not decoded(api, {name: False})[0].text.keeps_stop


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"guided_regex": "a"}, {"regex": "a", "disable_any_whitespace": False}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ],
)
def test_structured_outputs_is_the_newer_name_of_the_guided_fields(api, older, newer):
    first, second = decoded(api, older)[0], decoded(api, {"structured_outputs": newer})[0]
    assert first.grammar == second.grammar
    assert second.grammar_field.startswith("structured_outputs.")


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("ours", "theirs", "value"),
    [
        ("guided_json", "json_schema", '{"type": "object"}'),
        ("guided_regex", "regex", "a"),
        ("guided_grammar", "ebnf", 'root ::= "a"'),
    ],
)
def test_sglangs_names_of_the_guided_fields_are_honoured(api, ours, theirs, value):
    first, second = decoded(api, {ours: value})[0], decoded(api, {theirs: value})[0]
    assert first.grammar == second.grammar
    assert (first.grammar_field, second.grammar_field) == (ours, theirs)
    with pytest.raises(BadRequestError, match=f"{theirs} both set"):
        decoded(api, {ours: value, theirs: value})


@pytest.mark.parametrize("name", FOREIGN_ELSEWHERE)
@pytest.mark.parametrize("api", ["responses", "messages"])
def test_what_completions_honour_is_neutral_elsewhere(api, name):
    schema, base = OTHER_APIS[api]
    known = set(schema.__struct_fields__)
    for value in FOREIGN_ELSEWHERE[name]:
        body = base | {name: "x" if value is ANY else value}
        decode_with_names(
            json.dumps(base | ({} if name in known else body)).encode(), schema, "refuse"
        )
    if name not in known and name not in REJECTED and ANY not in FOREIGN_ELSEWHERE[name]:
        body = json.dumps(base | {name: {"other": "value"}}).encode()
        assert decode_with_names(body, schema, "report").unknown_fields == [name]


def test_two_forms_are_named_in_structured_outputs_too():
    with pytest.raises(BadRequestError, match=r"structured_outputs\.regex and"):
        decoded("chat", {"structured_outputs": {"regex": "a", "choice": ["b"]}})


def test_the_default_lifetime_of_cached_prompts_is_neutral():
    for options in ({}, {"ttl": "30m"}, {"mode": "implicit", "ttl": "30m"}, {"ttl": None}):
        assert decoded("chat", {"prompt_cache_options": options}) == decoded("chat", {})
    for options in ({"ttl": "1h"}, {"mode": "explicit", "ttl": "30m"}, {"other": 0}):
        with pytest.raises(BadRequestError, match="prompt_cache_options is not supported"):
            decoded("chat", {"prompt_cache_options": options})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": None, "format": None}),
        ("prediction", {"content": []}),
        ("stream_options", {}),
        ("stream_options", {"include_usage": False, "include_obfuscation": None}),
        ("chat_template_kwargs", {"documents": []}),
        ("mm_processor_kwargs", {"min_pixels": None}),
        ("nvext", {"guided_json": None, "guided_regex": None}),
        ("structured_outputs", {"json": None, "json_object": False}),
        ("response_format", None),
    ],
)
def test_an_object_of_nothing_is_absent(name, value):
    """Clients write whole objects whose members are at their defaults."""
    assert decoded("chat", {name: value}) == decoded("chat", {})


@pytest.mark.parametrize(
    ("api", "fields"),
    [
        ("messages", {"thinking": {"type": "disabled", "budget_tokens": None}}),
        ("messages", {"context_management": {"edits": []}}),
        ("messages", {"tool_choice": {"type": "none", "disable_parallel_tool_use": False}}),
        ("responses", {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}}),
        ("responses", {"reasoning": {"effort": None, "summary": None}, "text": {"format": None}}),
        ("responses", {"conversation": {}, "stream_options": {}, "prompt": {"id": None}}),
    ],
)
def test_nested_neutral_values_are_taken_by_every_api(api, fields):
    schema, base = OTHER_APIS[api]
    body = decode_with_names(json.dumps(base | fields).encode(), schema, "refuse").value
    generate = messages_generation if api == "messages" else responses_generation
    generate(body)
