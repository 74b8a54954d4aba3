"""Rules between fields: what the document says of them, and what the server refuses."""

import asyncio
import functools
import json
import re

import jsonschema
import pytest
from support.http_side import MODEL, ScriptedEngine, client_of, write_checkpoint
from support.openapi_hooks import ERRORS

from vlmserve.server.errors import BadRequestError
from vlmserve.server.images.loader import ImageLoader
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.schemas import rules
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.schemas.openai.chat import ChatCompletionRequest


def user(content):
    return {"role": "user", "content": content}


CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
STACK_TOOL = {"tool_name": "f"}
SENT_PICTURE = user([{"type": "image_url", "image_url": "https://example.com/a.png"}])
CHAT = "/v1/chat/completions"
STACK = "/inference/chat_completion"
# For each rule that the document tells in words: a body that breaks it and fits the schema.
RESPONSES = "/v1/responses"
MODERATIONS = "/v1/moderations"
BROKEN = {
    rules.STORED: (RESPONSES, {"previous_response_id": "resp_none"}),
    rules.ITEMS: (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}),
    rules.NO_NUL: (CHAT, {"messages": [user("a\0b")]}),
    rules.RESULTS: (CHAT, {"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}),
    rules.PICTURES: (CHAT, {"messages": [user([{"type": "image_url", "image_url": "no"}])]}),
    rules.CONTEXT: (CHAT, {"max_tokens": 2**31 - 1}),
    rules.ONE_MAXIMUM: (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}),
    rules.MINIMUM: (CHAT, {"max_tokens": 1, "min_tokens": 2}),
    rules.ONE_FORM: (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}),
    rules.COMPILED: (CHAT, {"guided_json": "no"}),
    rules.TOOL_NAMES: (CHAT, {"tools": [TOOL, TOOL]}),
    rules.PARAMETERS: (
        CHAT,
        {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
    ),
    rules.NAMED_TOOL: (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ),
    rules.ARGUMENTS: (
        CHAT,
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        CALL | {"function": {"name": "f", "arguments": "[" * 70 + "]" * 70}}
                    ],
                }
            ]
        },
    ),
    rules.VOCABULARY: (CHAT, {"stop_token_ids": [2**31 - 1]}),
    rules.NUM_ANSWERS: (CHAT, {"n": 128}),
    rules.PROMPT_ENTRIES: (
        CHAT,
        {"messages": [user("What " * 5000)], "prompt_logprobs": 20},
    ),
    rules.ONE_MODEL: (STACK, {"model": MODEL, "model_id": "alias"}),
    rules.ONE_SETTING: (
        STACK,
        {"tools": [STACK_TOOL], "tool_choice": "none", "tool_config": {"tool_choice": "auto"}},
    ),
    rules.TOKENS: ("/v1/completions", {"prompt": [[]]}),
    rules.TEMPLATE: (
        CHAT,
        {"messages": [{"role": "system", "content": "a"}], "tools": [TOOL]},
    ),
    rules.CONTINUED: (CHAT, {"continue_final_message": True}),
    rules.VARIABLES: (
        CHAT,
        {"chat_template_kwargs": functools.reduce(lambda one, _: {"a": one}, range(20), {})},
    ),
    rules.GUARD: (MODERATIONS, {"input": "a"}),
    rules.CUT: (CHAT, {"messages": [SENT_PICTURE], "truncate_prompt_tokens": 1}),
    rules.BEST_OF: ("/v1/completions", {"prompt": "a", "n": 3, "best_of": 2}),
    rules.USERS_PICTURES: (
        STACK,
        {"messages": [{"role": "system", "content": {"image": {"uri": "data:,"}}}]},
    ),
}

# Bodies that the code refuses beside the types, and that do not fit the schema either.
UNFIT = [
    (CHAT, {"store": True}),
    (CHAT, {"modalities": ["audio"]}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": ["a", 1]}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}),
    (CHAT, {"service_tier": "flex"}),
    (CHAT, {"functions": [{}]}),
    (CHAT, {"function_call": {"name": "f"}}),
    (CHAT, {"logit_bias": {"01": 1}}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {"prompt_cache_options": {"mode": "explicit"}}),
    (CHAT, {"prompt_cache_options": {"other": 1}}),
    (CHAT, {"prediction": {"type": "content"}}),
    (CHAT, {"top_logprobs": 1}),
    (CHAT, {"stream": True, "prompt_logprobs": 0}),
    (CHAT, {"tool_choice": "required"}),
    (CHAT, {"chat_template_kwargs": {"messages": [1]}}),
    (MODERATIONS, {"input": ["a", {"type": "text", "text": "b"}]}),
    (CHAT, {"guided_choice": []}),
    (CHAT, {"guided_choice": [""]}),
    (CHAT, {"messages": [user([{"text": "no type"}])]}),
    (STACK, {"model": None}),
    (STACK, {"messages": [user({"type": "image"})]}),
    (STACK, {"messages": [user({"type": "text", "image": {"uri": "data:,"}})]}),
    (STACK, {"messages": [user({"image": {"uri": "data:,", "data": "AA=="}})]}),
    (STACK, {"messages": [{"role": "system", "content": "a", "context": "b"}]}),
    (STACK, {"messages": [user("a") | {"tool_calls": [{"tool_name": "f", "arguments": {}}]}]}),
    ("/tokenize", {"prompt": "a"}),
    ("/tokenize", {"prompt": "a", "tools": [TOOL], "messages": None}),
]


def body_of(path, fields):
    """A whole body with these fields."""
    base = {"model": MODEL}
    if path == RESPONSES:
        base["input"] = "What?"
    elif path not in ("/v1/completions", MODERATIONS):
        base["messages"] = [user("What?")]
    return base | fields


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> tuple:
    """Its document, and its answers to all those bodies, in their order."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    bodies = [(path, body_of(path, fields)) for path, fields in [*BROKEN.values(), *UNFIT]]

    async def run():
        engine = ScriptedEngine(lambda request: [])
        images = ImageLoader(ImageSettings(), None, None)
        names = {"served_model_names": [MODEL, "alias"]}
        async with client_of(checkpoint, engine, images=images, **names) as client:
            document = (await client.get("/openapi.json")).json()
            return document, [await client.post(path, json=body) for path, body in bodies]

    return asyncio.run(run())


def operation_of(document, path):
    return document["paths"][path]["post"]["requestBody"]


def validator_of(document, path):
    schema = operation_of(document, path)["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator(schema | {"components": document["components"]})


def test_every_rule_told_in_words_is_one_that_fuzzing_knows(server):
    document, _ = server
    told = {
        line.removeprefix("- ")
        for path in document["paths"].values()
        for line in path.get("post", {}).get("requestBody", {}).get("description", "").splitlines()
        if line.startswith("- ")
    }
    assert told == set(BROKEN)
    assert told == set(ERRORS)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_body_that_fits_the_schema_is_refused_by_the_rule_that_the_document_tells(server, rule):
    document, responses = server
    path, fields = BROKEN[rule]
    assert f"- {rule}" in operation_of(document, path)["description"]
    validator_of(document, path).validate(body_of(path, fields))
    response = responses[list(BROKEN).index(rule)]
    assert response.status_code == 400
    assert re.search(ERRORS[rule], response.json()["message"])


@pytest.mark.parametrize("index", range(len(UNFIT)), ids=[str(fields) for _, fields in UNFIT])
def test_what_code_refuses_beside_the_types_does_not_fit_the_schema(server, index):
    document, responses = server
    path, fields = UNFIT[index]
    assert not validator_of(document, path).is_valid(body_of(path, fields))
    assert responses[len(BROKEN) + index].status_code == 400


def test_a_whole_number_is_an_integer_however_it_is_written():
    def decode(fields):
        body = b'{"model": "m", "messages": [{"role": "user", "content": "a"}], %s}'
        return decode_body(body % fields, ChatCompletionRequest)

    decoded = decode(b'"max_tokens": 256.0, "n": 2e0, "temperature": 1.0, "top_p": 0.5')
    assert (decoded.max_tokens, decoded.n) == (256, 2)
    assert (decoded.temperature, decoded.top_p) == (1.0, 0.5)
    for fields in (b'"max_tokens": 1.5', b'"n": 1e30', b'"stream": 1.0', b'"max_tokens": 1e999'):
        with pytest.raises(BadRequestError):
            decode(fields)


@pytest.mark.parametrize("ignore", [True, False])
def test_a_body_of_very_many_numbers_is_read_as_it_is_written(ignore):
    numbers = b",".join([b"1.5"] * 20_000)
    body = (
        b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2.0,'
        b' "metadata": {"numbers": [%s]}}'
    )
    with pytest.raises(BadRequestError, match="max_tokens"):
        decode_body(body % numbers, ChatCompletionRequest, unknown="ignore" if ignore else "refuse")
    few = decode_body(
        body % b"1.5", ChatCompletionRequest, unknown="ignore" if ignore else "refuse"
    )
    assert few.max_tokens == 2


def test_the_type_of_a_lone_kind_of_part_may_be_left_out():
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": [{"text": "a"}]},
            {"role": "assistant", "tool_calls": [CALL]},
        ],
        "tools": [{"function": {"name": "f"}}],
    }
    decoded = decode_body(json.dumps(body).encode(), ChatCompletionRequest)
    assert decoded.tools[0].type == "function"
    wrong = body | {"tools": [{"type": "other", "function": {"name": "f"}}]}
    with pytest.raises(BadRequestError, match="type"):
        decode_body(json.dumps(wrong).encode(), ChatCompletionRequest)
