"""Forms with a dead end, and forms that are obeyed in part: named, counted, logged."""

import asyncio
import json
import logging

import msgspec
import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    frames_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

from vlmserve.server.errors import BadRequestError
from vlmserve.server.structured_output.compile_checks import GrammarChecks

TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"
SETS = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {"a": schema}}}}
    for name, schema in (("a", {"type": "string"}), ("b", SETS))
]
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What"}]}


@pytest.fixture(autouse=True)
def no_grammar_is_compiled(monkeypatch):
    """The small tokenizer takes none. Those that name `bad` do not compile."""

    async def check(self, grammar, field, *_):
        if "bad" in grammar:
            raise BadRequestError(f"{field} cannot be compiled", param=field)
        return grammar

    monkeypatch.setattr(GrammarChecks, "check", check)


def aborted(text):
    """An engine's outputs whose matcher fails after this text."""
    *outputs, last = tokens_one_by_one(TOKENIZER, text)
    return [*outputs, msgspec.structs.replace(last, finish_reason="abort")]


def sent(checkpoint, *bodies, script=None):
    async def run():
        engine = ScriptedEngine(lambda request: script or aborted("What"))
        async with client_of(checkpoint, engine) as client:
            answers = [await client.post(CHAT, json=BODY | body) for body in bodies]
            return [*answers, (await client.get("/metrics")).text]

    return asyncio.run(run())


def test_a_dead_end_is_a_400_that_names_the_form(checkpoint, caplog):
    """It used to be a 500 without a cause, which SDKs retry."""
    with caplog.at_level(logging.WARNING):
        answer, page = sent(checkpoint, {"guided_regex": "a|b"})
    error = error_of(answer, 400)
    assert error["param"] == "guided_regex"
    assert error["code"] == "form_dead_end"
    assert "guided_regex has a dead end" in error["message"]
    assert "vlmserve_form_dead_ends_total 1.0" in page
    assert any("guided_regex has a dead end" in one.getMessage() for one in caplog.records)


def test_a_stream_ends_with_the_same_words(checkpoint):
    answer, _ = sent(checkpoint, {"guided_regex": "a|b", "stream": True})
    *_, frame, done = frames_of(answer)
    assert done == "[DONE]"
    assert "guided_regex has a dead end" in json.loads(frame)["error"]["message"]


def test_an_abort_without_a_form_stays_the_servers_own_error(checkpoint):
    answer, page = sent(checkpoint, {})
    assert answer.status_code == 500
    assert "vlmserve_form_dead_ends_total 0.0" in page


def test_keywords_that_no_form_obeys_are_reported(checkpoint):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SETS}}
    script = list(tokens_one_by_one(TOKENIZER, "What"))
    answers = sent(
        checkpoint,
        {"response_format": schema, "zzz": 1},
        {"tools": TOOLS, "tool_choice": "required"},
        script=script,
    )
    names = [answer.headers.get("x-ignored-fields") for answer in answers[:2]]
    assert names == [
        "zzz, response_format.json_schema.schema.uniqueItems",
        "tools[1].function.parameters.properties.a.uniqueItems",
    ]
    assert 'vlmserve_ignored_fields_total{field="other"} 3.0' in answers[-1]


def test_an_error_names_the_tool_whose_schema_does_not_compile(checkpoint):
    bad = {"type": "function", "function": {"name": "c", "parameters": {"title": "bad"}}}
    answer, _ = sent(checkpoint, {"tools": [*TOOLS, bad], "tool_choice": "required"})
    assert error_of(answer, 400)["param"] == "tools[2].function.parameters"


@pytest.mark.parametrize(("choice", "content"), [("required", None), ("auto", "")])
def test_a_forced_call_streams_without_an_empty_text(checkpoint, choice, content):
    """Clients that show each text part used to show an empty one before the call."""
    body = {"tools": TOOLS, "tool_choice": choice, "stream": True}
    script = list(tokens_one_by_one(TOKENIZER, '{"name": "a", "parameters": {}}'))
    first, *_ = frames_of(sent(checkpoint, body, script=script)[0])
    delta = {"role": "assistant", "content": content}
    assert json.loads(first)["choices"][0]["delta"] == delta
