"""Answers in the form that was asked for, over HTTP, whatever the bundled model would say."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import httpx2
import pytest
from llguidance import LLMatcher, LLTokenizer

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.grammar import Grammars
from vlmserve.server.errors import BadRequestError
from vlmserve.server.structured_output.compile_checks import GrammarChecks
from vlmserve.server.structured_output.compile_child import Verdict, judge
from vlmserve.server.structured_output.grammar_text import json_schema_grammar, regex_grammar

MODEL = "vlmserve-tiny-vision"
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "étoile"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["shape", "count", "tags"],
    "additionalProperties": False,
    "$defs": {
        "tag": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "additionalProperties": False,
        }
    },
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCHEMA}}
REGEX = r"(yes|no), [0-9]{1,3} (circles?|squares?)\."
GBNF = 'root ::= "a" ("b" | "c") ("b" | "c") "."'
LARK = 'start: "x" NUM "!"\nNUM: /[0-9]{2}/'


def is_scene(text: str) -> bool:
    scene = json.loads(text)
    assert set(scene) == {"shape", "count", "tags"}
    assert scene["shape"] in SCHEMA["properties"]["shape"]["enum"]
    assert all(isinstance(tag.get("ok", True), bool) for tag in scene["tags"])
    return 0 <= scene["count"] <= 99 and len(scene["tags"]) <= 2


def matches(pattern: str):
    return lambda text: re.fullmatch(pattern, text) is not None


# field -> value, and what a whole answer must fulfil
FORMS = {
    "json_schema": ({"response_format": JSON_FORMAT}, is_scene),
    "json_object": (
        {"response_format": {"type": "json_object"}},
        lambda text: isinstance(json.loads(text), dict),
    ),
    "guided_json": ({"guided_json": SCHEMA}, is_scene),
    "guided_json as text": ({"guided_json": json.dumps(SCHEMA)}, is_scene),
    "guided_regex": ({"guided_regex": REGEX}, matches(REGEX)),
    "guided_choice": ({"guided_choice": ["red", "deep blue", 'a"b']}, {"red", "deep blue", 'a"b'}),
    "spelled marks": (
        {"guided_choice": ["<|eot_id|>", "<|python_tag|>a"]},
        {"<|eot_id|>", "<|python_tag|>a"},
    ),
    "gbnf": ({"guided_grammar": GBNF}, matches(r"a[bc][bc]\.")),
    "lark": ({"guided_grammar": LARK}, matches(r"x[0-9]{2}!")),
    "nvext": ({"nvext": {"guided_regex": REGEX}}, matches(REGEX)),
}


def body(**fields) -> dict:
    question = {"role": "user", "content": "Who are you?"}
    return {"model": MODEL, "messages": [question], "max_tokens": 96} | fields


def ask(server, path=CHAT, **fields) -> dict:
    response = httpx2.post(server.url + path, json=body(**fields), timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def fulfils(check, text: str) -> bool:
    return text in check if isinstance(check, set) else check(text)


@pytest.mark.parametrize("name", FORMS)
def test_every_answer_has_its_form_or_ran_out_of_tokens(server, name):
    fields, check = FORMS[name]
    num_whole = 0
    for temperature, seed in [(0, 1), (1, 2), (1, 3), (2, 4)]:
        answer = ask(server, temperature=temperature, seed=seed, n=2, **fields)
        for choice in answer["choices"]:
            text = choice["message"]["content"]
            if choice["finish_reason"] == "length":
                continue
            assert choice["finish_reason"] == "stop"
            assert choice["stop_reason"] is None
            assert fulfils(check, text), text
            num_whole += 1
    assert num_whole >= (1 if name == "json_object" else 6)


def test_an_answer_that_ran_out_of_tokens_is_the_beginning_of_a_whole_one(server):
    for max_tokens in (1, 2, 5, 9):
        fields = {"response_format": JSON_FORMAT, "max_tokens": max_tokens, "seed": max_tokens}
        choice = ask(server, temperature=1, **fields)["choices"][0]
        assert choice["finish_reason"] == "length"
        tokenizer = LLTokenizer(str(CHECKPOINT / "tokenizer.json"))
        matcher = LLMatcher(tokenizer, json_schema_grammar(SCHEMA))
        assert matcher.consume_tokens(tokenizer.tokenize_str(choice["message"]["content"]))


def test_streamed_pieces_joined_are_the_plain_answer(server, sdk):
    call = body(response_format=JSON_FORMAT, temperature=1, seed=11)
    plain = sdk.chat.completions.create(**call).choices[0].message.content
    pieces = [
        c.choices[0].delta.content or "" for c in sdk.chat.completions.create(**call, stream=True)
    ]
    assert "".join(pieces) == plain


@pytest.mark.parametrize(
    "extra",
    [
        {"min_tokens": 40},
        {"ignore_eos": True},
        {"logit_bias": {str(token): -100 for token in range(200)}},
        {"stop": ["circle"]},
        {"repetition_penalty": 2.0, "frequency_penalty": 2.0, "top_k": 1},
        {"logprobs": True, "top_logprobs": 3},
    ],
)
def test_the_form_holds_beside_every_other_parameter(server, extra):
    answer = ask(server, guided_regex=REGEX, temperature=1, seed=5, **extra)
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if choice["stop_reason"] == "circle":
        assert re.fullmatch(r"(yes|no), [0-9]{1,3} ", text)
    else:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(REGEX, text)


def test_requests_without_a_form_answer_beside_others_as_alone(server):
    questions = ["Who are you?", "What can you do?", "What is this?"]

    async def together() -> list[str]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=120) as client:

            async def one(number: int) -> str:
                fields = {"temperature": 0, "max_tokens": 24}
                if number % 2:
                    fields |= (
                        {"guided_regex": "[a-z]{3,9}"}
                        if number % 4 == 1
                        else {"guided_json": SCHEMA}
                    )
                content = questions[number // 2 % 3]
                message = [{"role": "user", "content": content}]
                response = await client.post(CHAT, json=body(messages=message, **fields))
                assert response.status_code == 200, response.text
                return response.json()["choices"][0]["message"]["content"]

            return await asyncio.gather(*(one(number) for number in range(48)))

    answers = asyncio.run(together())
    for number in range(0, 48, 2):
        message = [{"role": "user", "content": questions[number // 2 % 3]}]
        alone = ask(server, messages=message, temperature=0, max_tokens=24)
        assert answers[number] == alone["choices"][0]["message"]["content"]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_that_is_required_comes_and_fits_its_schema(server, choice, parallel):
    side = {"type": "string", "enum": ["left", "right"]}
    schemas = {
        "look": {"type": "object", "properties": {"at": side}, "required": ["at"]},
        "count": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    schemas["look"]["additionalProperties"] = False
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in schemas.items()
    ]
    fields = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}
    for seed in range(3):
        message = ask(server, temperature=1, seed=seed, max_tokens=200, **fields)["choices"][0]
        calls = message["message"]["tool_calls"]
        assert message["finish_reason"] in ("tool_calls", "length")
        if message["finish_reason"] == "length":
            continue
        assert calls
        assert message["message"]["content"] is None
        if not parallel:
            assert len(calls) == 1
        for call in calls:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert name in (schemas if choice == "required" else ["look"])
            assert arguments.get("at") in (["left", "right"] if name == "look" else [None])


def test_llama_stack_takes_a_schema_and_a_grammar(server):
    question = [{"role": "user", "content": "Who are you?"}]
    for form, check in [
        ({"type": "json_schema", "json_schema": SCHEMA}, is_scene),
        ({"type": "grammar", "bnf": {"grammar": GBNF}}, matches(r"a[bc][bc]\.")),
        ({"type": "grammar", "bnf": GBNF}, matches(r"a[bc][bc]\.")),
    ]:
        stack = {"model_id": MODEL, "messages": question, "response_format": form}
        response = httpx2.post(
            f"{server.url}/v1/inference/chat-completion", json=stack, timeout=120
        )
        assert response.status_code == 200, response.text
        assert fulfils(check, response.json()["completion_message"]["content"])


DEEP = {"type": "object"}
for _ in range(80):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "["}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a\0"}, "guided_regex"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_regex": "(abcdefghij){60000}"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice"),
        # The translation to Lark takes the name for root.
        ({"guided_grammar": 'root ::= start "a"\nstart ::= "b"'}, "guided_grammar"),
        ({"guided_grammar": "nothing of the kind"}, "guided_grammar"),
        ({"guided_grammar": 'start: <|eot_id|> "a"'}, "guided_grammar"),
        ({"guided_json": DEEP}, "guided_json"),
        ({"guided_json": "no json"}, "guided_json"),
        ({"guided_json": {"type": "unheard of"}}, "guided_json"),
        ({"guided_json": False}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "nvext": {"guided_regex": "a"}}, "nvext.guided_regex"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"nvext": {"guided_jsno": {}}}, "nvext.guided_jsno"),
        ({"guided_regexp": "a"}, "guided_regexp"),
    ],
)
def test_a_form_that_cannot_be_is_a_400_that_names_its_field(server, fields, param):
    response = httpx2.post(server.url + CHAT, json=body(**fields), timeout=60)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600


def test_row_08_a_grammar_that_takes_too_long_is_refused_and_its_process_replaced(monkeypatch):
    # However long a busy machine takes to give the child its processor time.
    monkeypatch.setattr("vlmserve.server.structured_output.compile_checks.WALL_FACTOR", 10_000)

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT, timeout_s=30.0)
        slow = json_schema_grammar(
            {"type": "array", "items": {"allOf": [{"pattern": f"{i}.*b{{9}}"} for i in range(60)]}},
            "field",
        )
        try:
            await checks.check(regex_grammar("[a-z]+"), "field", "t")
            (child,) = checks._idle
            checks._timeout_s = 0.01
            with pytest.raises(BadRequestError, match="longer than"):
                await checks.check(slow, "field", "t")
            assert child.returncode is not None
            checks._timeout_s = 30.0
            assert await checks.check(regex_grammar("[0-9]+"), "field", "t")
        finally:
            await checks.close()

    asyncio.run(scenario())


def test_a_process_that_ended_while_it_waited_costs_no_grammar_its_check():
    """It used to be taken for one that ran out of memory over the next grammar."""

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT, timeout_s=30.0)
        try:
            await checks.check(regex_grammar("[a-z]+"), "field", "t")
            (child,) = checks._idle
            child.kill()
            await child.wait()
            assert await checks.check(regex_grammar("[0-9]+"), "field", "t")
        finally:
            await checks.close()

    asyncio.run(scenario())


def test_row_38_what_is_known_of_grammars_is_a_tenant_s_own(monkeypatch):
    """Another key's grammar was answered at once: the time told that somebody had sent it."""
    asked = []

    async def ask(process, question, timeout_s):
        asked.append(question)
        return Verdict(grammar=question.decode())

    monkeypatch.setattr("vlmserve.server.structured_output.compile_checks._ask", ask)

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT, timeout_s=30.0)
        try:
            for tenant in ("a", "b", "a", "b"):
                await checks.check(regex_grammar("[a-z]+"), "field", tenant)
        finally:
            await checks.close()

    asyncio.run(scenario())
    assert len(asked) == 2


def test_row_38_a_process_that_compiles_for_all_keeps_nothing():
    grammars = Grammars(CHECKPOINT, vocab_size=0)
    assert judge(regex_grammar("[a-z]+"), grammars).grammar is not None
    assert not grammars._compiled


def test_row_09_what_is_known_of_grammars_is_bounded(monkeypatch):
    monkeypatch.setattr("vlmserve.server.structured_output.compile_checks.MAX_VERDICTS", 5)

    async def scenario() -> None:
        checks = GrammarChecks(CHECKPOINT, timeout_s=30.0)
        try:
            for number in range(20):
                await checks.check(regex_grammar(f"x{number}"), "field", "t")
            assert len(checks._verdicts) == 5
        finally:
            await checks.close()

    asyncio.run(scenario())


def test_the_documents_example_runs_as_it_stands(server):
    text = (Path(__file__).resolve().parents[2] / "docs" / "structured-output.md").read_text()
    example = re.search(r"-d '(\{.*?\})'", text, re.DOTALL)
    assert example is not None
    answer = httpx2.post(server.url + CHAT, json=json.loads(example[1]), timeout=60).json()
    scene = json.loads(answer["choices"][0]["message"]["content"])
    assert scene["shape"] in ("circle", "square")
    assert scene["count"] <= 9
