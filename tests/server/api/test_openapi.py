"""The API's document: generated from the types that validate, complete, and true."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import jsonschema
import openapi_spec_validator
import pytest
from support.http_side import MODEL, OneTileImages, ScriptedEngine, client_of

from vlmserve.server.api import openapi
from vlmserve.server.errors import ApiError
from vlmserve.server.http.auth import KEYLESS_PATHS
from vlmserve.server.http.page_files import DOCS_PATHS, UI_PATHS
from vlmserve.server.routes import samples
from vlmserve.server.settings import ServerSettings
from vlmserve.server.worker.app import build_app

DATA = Path(__file__).resolve().parents[2] / "data"
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


def app_of(checkpoint, **settings):
    fields = {"served_model_names": [MODEL]} | settings
    options = ServerSettings(model=str(checkpoint), engine_socket="", **fields)
    engine = ScriptedEngine(lambda request: [])
    return build_app(options, engine_client=engine, images=OneTileImages())


@pytest.fixture(scope="module")
def document(checkpoint) -> dict:
    """That of a server with no settings but its model."""
    return document_of(checkpoint)


def document_of(checkpoint, **settings):
    return json.loads(app_of(checkpoint, **settings).ctx.document())


def operations_of(document):
    return {
        (method.upper(), path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def get(checkpoint, path, headers=None, **settings):
    async def run():
        engine = ScriptedEngine(lambda request: [])
        async with client_of(checkpoint, engine, **settings) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(run())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"api_keys": ["k"]}, marks=pytest.mark.slow),
        pytest.param({"unknown_fields": "refuse"}, marks=pytest.mark.slow),
    ],
)
def test_the_document_is_valid_openapi(checkpoint, settings):
    document = document_of(checkpoint, **settings)
    assert document["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(document)


def test_the_document_tells_of_every_route_and_of_no_other(checkpoint, document):
    app = app_of(checkpoint)
    routes = {
        (method, "/" + re.sub(r"<(\w+)(:\w+)?>", r"{\1}", route.path))
        for route in app.router.routes
        for method in route.methods
    }
    assert routes == set(operations_of(document))


def test_every_operation_has_a_name_of_its_own_and_a_summary(document):
    operations = operations_of(document).values()
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for operation in operations)


def test_every_status_that_an_error_can_have_is_described():
    def statuses(kind):
        return {kind.status}.union(*map(statuses, kind.__subclasses__()))

    assert statuses(ApiError) <= set(openapi.REFUSALS)


def test_every_example_fits_its_schema(document):
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


def test_keys_are_asked_for_in_the_document_as_by_the_server(checkpoint, document):
    operations = operations_of(document_of(checkpoint, api_keys=["k"]))
    without = {
        path for (_, path), operation in operations.items() if operation.get("security") == []
    }
    assert without == KEYLESS_PATHS
    for (_, path), operation in operations.items():
        assert ("401" in operation["responses"]) is (path not in without), path
    assert "security" not in document


def test_unknown_fields_are_open_in_the_document_where_the_server_drops_them(checkpoint):
    def closed(**settings):
        schemas = document_of(checkpoint, **settings)["components"]["schemas"]
        return {name for name, one in schemas.items() if one.get("additionalProperties") is False}

    assert {"ChatCompletionRequest", "ImageUrl", "StackSampling"} <= closed(unknown_fields="refuse")
    assert not closed(unknown_fields="ignore")
    assert not closed()


def test_the_server_sends_the_document_and_the_page(checkpoint, document):
    response = get(checkpoint, "/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert response.json() == document
    page = get(checkpoint, "/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("path", sorted(DOCS_PATHS | UI_PATHS))
def test_the_page_and_its_files_need_no_key_but_an_allowed_host(checkpoint, path):
    """A browser can send a key only after the page has loaded and asked for it."""
    response = get(checkpoint, path, api_keys=["k"], allowed_hosts=["127.0.0.1"])
    assert response.status_code == 200
    assert len(response.content) > 100
    rejected = get(checkpoint, path, api_keys=["k"], allowed_hosts=["elsewhere.example"])
    assert rejected.status_code == 400


def test_the_authorize_dialog_of_the_page_sends_the_key_as_a_bearer(checkpoint):
    assert get(checkpoint, "/openapi.json", api_keys=["k"]).status_code == 401
    headers = {"Authorization": "Bearer k"}
    response = get(checkpoint, "/openapi.json", headers=headers, api_keys=["k"])
    [(name, scheme)] = response.json()["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert f'preauthorizeApiKey("{name}", key)' in (PAGES / "initializer.js").read_text()


def test_the_page_loads_only_files_of_this_server_and_has_no_inline_code():
    page, script = [(PAGES / name).read_text() for name in ("docs.html", "initializer.js")]
    for text in (page, script):
        assert "//" not in re.sub(r"(?m)^\s*// .*$", "", text)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|style=", page)
    referenced = re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(
        r'fetch\("([^"]+)"', script
    )
    assert {f"/{path}" for path in referenced} | {"/docs"} == DOCS_PATHS | {"/openapi.json"}
    assert "validatorUrl: null" in script


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_draws_every_operation(checkpoint, document, tmp_path):
    async def draw():
        async with client_of(checkpoint, ScriptedEngine(lambda request: [])) as client:
            process = await asyncio.create_subprocess_exec(
                "chromium", *CHROMIUM, f"--user-data-dir={tmp_path}", "--dump-dom",
                f"{client.base_url}/docs#post_v1_chat_completions",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                return (await process.communicate())[0].decode()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    drawn = asyncio.run(draw())
    for operation in operations_of(document).values():
        assert f'-{operation["operationId"]}"' in drawn
