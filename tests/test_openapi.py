"""The API's document: generated from the types that validate, complete, and true."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import jsonschema
import openapi_spec_validator
import pytest
from support.http_side import MODEL, OneTileImages, ScriptedEngine, client_of, write_checkpoint
from support.openapi_hooks import TOLD

from vlmserve.server import openapi
from vlmserve.server.access import OPEN_PATHS
from vlmserve.server.app import build_app
from vlmserve.server.errors import ApiError, BadRequestError
from vlmserve.server.images.loader import ImageLoader
from vlmserve.server.images.settings import ImageSettings
from vlmserve.server.routes import samples
from vlmserve.server.schemas import rules
from vlmserve.server.schemas.chat import ChatCompletionRequest
from vlmserve.server.schemas.decoding import decode_body
from vlmserve.server.settings import ServerSettings

DATA = Path(__file__).parent / "data"
PAGES = Path(openapi.__file__).parent / "pages"
CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=20000",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("chat.request", samples.CHAT_REQUEST),
        ("chat.response", samples.CHAT_COMPLETION),
        ("llama_stack.request", samples.STACK_REQUEST),
        ("llama_stack.response", samples.STACK_COMPLETION),
    ],
)
def test_the_documents_examples_are_the_documented_samples(name, sample):
    documented = json.loads((DATA / f"{name}.json").read_text())
    assert json.dumps(sample) == json.dumps(documented)


def test_the_example_of_models_is_the_documented_one_but_for_its_random_id():
    documented = json.loads((DATA / "models.response.json").read_text())
    permission = documented["data"][0]["permission"][0]
    permission["id"] = samples.MODEL_LIST["data"][0]["permission"][0]["id"]
    assert json.dumps(samples.MODEL_LIST) == json.dumps(documented)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def app_of(checkpoint, **settings):
    fields = {"served_model_names": [MODEL]} | settings
    options = ServerSettings(model=str(checkpoint), engine_socket="", **fields)
    engine = ScriptedEngine(lambda request: [])
    return build_app(options, engine_client=engine, images=OneTileImages())


def document_of(checkpoint, **settings):
    return json.loads(app_of(checkpoint, **settings).ctx.document())


def operations_of(document):
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def get(checkpoint, path, **settings):
    async def run():
        engine = ScriptedEngine(lambda request: [])
        async with client_of(checkpoint, engine, **settings) as client:
            return await client.get(path)

    return asyncio.run(run())


@pytest.mark.parametrize("settings", [{}, {"api_keys": ["k"]}, {"unknown_fields": "ignore"}])
def test_the_document_is_valid_openapi(checkpoint, settings):
    document = document_of(checkpoint, **settings)
    assert document["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(document)


def test_the_document_tells_of_every_route_and_of_no_other(checkpoint):
    app = app_of(checkpoint)
    routes = {
        (method, "/" + re.sub(r"<(\w+)(:\w+)?>", r"{\1}", route.path))
        for route in app.router.routes
        for method in route.methods
    }
    assert routes == set(operations_of(document_of(checkpoint)))


def test_every_operation_has_a_name_of_its_own_and_a_summary(checkpoint):
    operations = operations_of(document_of(checkpoint)).values()
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for operation in operations)


def test_every_status_that_an_error_can_have_is_described():
    def statuses(kind):
        return {kind.status}.union(*map(statuses, kind.__subclasses__()))

    assert statuses(ApiError) <= set(openapi.REFUSALS)


def test_every_example_fits_its_schema(checkpoint):
    document = document_of(checkpoint)
    contents = [
        media
        for operation in operations_of(document).values()
        for part in (operation.get("requestBody", {}), *operation["responses"].values())
        for media in part.get("content", {}).values()
    ]
    checked = 0
    for media in contents:
        examples = [one["value"] for one in media.get("examples", {}).values()]
        examples += [media["example"]] if "example" in media else []
        schema = media["schema"] | {"components": document["components"]}
        for example in examples:
            jsonschema.Draft202012Validator(schema).validate(example)
            checked += 1
    assert checked > 10


def test_the_models_of_the_document_are_the_servers(checkpoint):
    document = document_of(checkpoint, served_model_names=["one", "two"])
    body = document["components"]["schemas"]["ChatCompletionRequest"]
    assert body["properties"]["model"]["enum"] == ["one", "two"]
    content = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert content["application/json"]["examples"]["picture"]["value"]["model"] == "one"


def test_keys_are_asked_for_in_the_document_as_by_the_server(checkpoint):
    operations = operations_of(document_of(checkpoint, api_keys=["k"]))
    without = {
        path for (_, path), operation in operations.items() if operation.get("security") == []
    }
    assert without == OPEN_PATHS
    for (_, path), operation in operations.items():
        assert ("401" in operation["responses"]) is (path not in without), path
    assert "security" not in document_of(checkpoint)


def test_unknown_fields_are_open_in_the_document_where_the_server_drops_them(checkpoint):
    def closed(**settings):
        schemas = document_of(checkpoint, **settings)["components"]["schemas"]
        return {name for name, one in schemas.items() if one.get("additionalProperties") is False}

    assert {"ChatCompletionRequest", "ImageUrl", "StackSampling"} <= closed()
    assert not closed(unknown_fields="ignore")


def test_the_server_sends_the_document_and_the_page(checkpoint):
    response = get(checkpoint, "/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == document_of(checkpoint)
    page = get(checkpoint, "/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs/page.js", "/docs/page.css"])
def test_the_document_and_the_page_need_the_key_where_there_is_one(checkpoint, path):
    assert get(checkpoint, path, api_keys=["k"]).status_code == 401


def test_the_page_asks_no_other_host_for_anything_and_holds_no_code():
    page, script, style = [
        (PAGES / name).read_text() for name in ("docs.html", "page.js", "page.css")
    ]
    for text in (page, script, style):
        assert "//" not in re.sub(r"(?m)^\s*// .*$", "", text)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|style=", page)
    assert not re.search(r"innerHTML|eval\(|document\.write", script)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_draws_every_operation(checkpoint, tmp_path):
    async def draw():
        async with client_of(checkpoint, ScriptedEngine(lambda request: [])) as client:
            process = await asyncio.create_subprocess_exec(
                "chromium", *CHROMIUM, f"--user-data-dir={tmp_path}", "--dump-dom",
                f"{client.base_url}/docs#post_v1_chat_completions",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            return (await process.communicate())[0].decode()

    drawn = asyncio.run(draw())
    for (method, _), operation in operations_of(document_of(checkpoint)).items():
        assert (f'id="{operation["operationId"]}"' in drawn) is (method != "HEAD")
    assert "ChatCompletionRequest" in drawn
    assert "stream_options" in drawn


def user(content):
    return {"role": "user", "content": content}


CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
STACK_TOOL = {"tool_name": "f"}
SENT_PICTURE = user([{"type": "image_url", "image_url": "https://example.com/a.png"}])
CHAT = "/v1/chat/completions"
STACK = "/inference/chat_completion"
# For each rule that the document tells in words: a body that breaks it and fits the schema.
BROKEN = {
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
                    "tool_calls": [CALL | {"function": {"name": "f", "arguments": "no"}}],
                }
            ]
        },
    ),
    rules.NO_TOOLS_BESIDE_PICTURES: (CHAT, {"messages": [SENT_PICTURE], "tools": [TOOL]}),
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
    rules.BEST_OF: ("/v1/completions", {"prompt": "a", "n": 3, "best_of": 2}),
    rules.USERS_PICTURES: (
        STACK,
        {"messages": [{"role": "system", "content": {"image": {"uri": "data:,"}}}]},
    ),
}


def told_in(document):
    return {
        line.removeprefix("- ")
        for operation in operations_of(document).values()
        for line in operation.get("requestBody", {}).get("description", "").splitlines()
        if line.startswith("- ")
    }


def test_every_rule_told_in_words_is_one_that_fuzzing_knows(checkpoint):
    told = told_in(document_of(checkpoint))
    assert told == set(BROKEN)
    assert told == set(TOLD)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_body_that_fits_the_schema_is_refused_by_the_rule_that_the_document_tells(
    checkpoint, rule
):
    path, fields = BROKEN[rule]
    body = {"model": MODEL, "messages": [user("What?")]} | fields
    if path == "/v1/completions":
        del body["messages"]
    settings = {"served_model_names": [MODEL, "alias"]}
    document = document_of(checkpoint, **settings)
    operation = document["paths"][path]["post"]["requestBody"]
    assert f"- {rule}" in operation["description"]
    schema = operation["content"]["application/json"]["schema"]
    schema = schema | {"components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)

    async def run():
        engine = ScriptedEngine(lambda request: [])
        images = ImageLoader(ImageSettings(), None, None)
        async with client_of(checkpoint, engine, images=images, **settings) as client:
            return await client.post(path, json=body)

    response = asyncio.run(run())
    assert response.status_code == 400
    assert re.search(TOLD[rule], response.json()["message"])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"top_k": 0}),
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
        (CHAT, {"stream_options": {}}),
        (CHAT, {"top_logprobs": 1}),
        (CHAT, {"stream": True, "prompt_logprobs": 0}),
        (CHAT, {"tool_choice": "required"}),
        (CHAT, {"guided_choice": []}),
        (CHAT, {"guided_choice": [""]}),
        (CHAT, {"messages": [{"role": "assistant"}]}),
        (CHAT, {"messages": [user([{"text": "no type"}])]}),
        (STACK, {"model": None}),
        (STACK, {"messages": [user({"type": "image"})]}),
        (STACK, {"messages": [user({"type": "text", "image": {"uri": "data:,"}})]}),
        (STACK, {"messages": [user({"image": {"uri": "data:,", "data": "AA=="}})]}),
        (STACK, {"messages": [{"role": "system", "content": "a", "context": "b"}]}),
        (STACK, {"messages": [user("a") | {"tool_calls": [{"tool_name": "f", "arguments": {}}]}]}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "tools": [TOOL], "messages": None}),
    ],
)
def test_what_code_refuses_beside_the_types_does_not_fit_the_schema(checkpoint, path, fields):
    base = {"model": MODEL}
    if path != "/v1/completions":
        base["messages"] = [user("What?")]
    body = base | ({"prompt": "a"} if path == "/tokenize" else {}) | fields
    document = document_of(checkpoint)
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = content["schema"] | {"components": document["components"]}
    assert not jsonschema.Draft202012Validator(schema).is_valid(body)

    async def run():
        async with client_of(checkpoint, ScriptedEngine(lambda request: [])) as client:
            return await client.post(path, json=body)

    assert asyncio.run(run()).status_code == 400


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
