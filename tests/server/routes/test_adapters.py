"""Adapters over HTTP: listed, named by requests of every route, loaded and unloaded."""

from __future__ import annotations

import asyncio

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)
from support.invariants import MESSAGES_ROUTES, RESPONSES, TEXT_ROUTES, body_for

from vlmserve.models.batch import AdapterRef
from vlmserve.models.lora.files import CONFIG, WEIGHTS
from vlmserve.router.errors import AdapterUnusableError
from vlmserve.server.adapters.settings import AdapterSettings, ServedAdapter

TOKENIZER = meta_like_tokenizer()
FRENCH = ServedAdapter(AdapterRef("french", "/a/french", "digest"), "org/french", 7, "start")
GENERATING = [*TEXT_ROUTES, RESPONSES, MESSAGES_ROUTES[0]]
RENDERING = ["/v1/chat/completions/render", "/v1/completions/render"]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def serve(checkpoint, use, *, script=None, **settings):
    """Run `use(client, engine)` against a server with the adapter french."""

    async def run():
        fields = {"at_start": [FRENCH]} | settings.pop("adapters", {})
        engine = ScriptedEngine(script or (lambda request: tokens_one_by_one(TOKENIZER, "What?")))
        adapters = AdapterSettings(**fields)
        async with client_of(checkpoint, engine, adapters=adapters, **settings) as client:
            return await use(client, engine)

    return asyncio.run(run())


def named(route, name):
    body = body_for(route.removesuffix("/render"))
    return body | {"model" if "model" in body else "model_id": name}


def test_an_adapter_is_listed_with_its_parent_and_where_it_is_from(checkpoint):
    async def use(client, engine):
        listed = (await client.get("/v1/models")).json()["data"]
        one = (await client.get("/v1/models/french")).json()
        stack = (await client.get("/ls/v1/models")).json()["data"]
        old = (await client.get("/models/get", params={"identifier": "french"})).json()
        return listed, one, stack, old

    listed, one, stack, old = serve(checkpoint, use)
    assert [card["id"] for card in listed] == [MODEL, "french"]
    assert [card["parent"] for card in listed] == [None, MODEL]
    assert [card["root"] for card in listed] == [MODEL, "org/french"]
    assert listed[1] == one
    assert one["created"] == 7
    assert [card["identifier"] for card in stack] == [MODEL, "french"]
    assert old["identifier"] == "french"


def test_a_request_of_any_route_names_its_adapter(checkpoint):
    async def use(client, engine):
        for route in GENERATING:
            for name in ("french", MODEL):
                answer = await client.post(route, json=named(route, name))
                assert answer.status_code == 200, (route, answer.text)
                if "model" in answer.json():
                    assert answer.json()["model"] == name
        for route in [*RENDERING, "/tokenize", MESSAGES_ROUTES[1]]:
            answer = await client.post(route, json=named(route, "french"))
            assert answer.status_code == 200, (route, answer.text)
        return [request.adapter for request in engine.requests]

    assert serve(checkpoint, use) == [FRENCH.ref, None] * len(GENERATING)


def test_an_unknown_name_is_refused_as_before(checkpoint):
    async def use(client, engine):
        return await client.post(GENERATING[0], json=named(GENERATING[0], "german"))

    error = error_of(serve(checkpoint, use), 404)
    assert error["code"] == "model_not_found"
    assert error["message"] == f"The model 'german' does not exist; this server has {MODEL}."


def test_an_adapter_that_the_engine_cannot_read_is_not_the_clients_mistake(checkpoint):
    async def use(client, engine):
        return await client.post(GENERATING[0], json=named(GENERATING[0], "french"))

    failed = [AdapterUnusableError("adapter_model.safetensors is missing")]
    error = error_of(serve(checkpoint, use, script=lambda request: failed), 503)
    assert "log" in error["message"]
    assert "safetensors" not in error["message"]


def test_the_document_lists_the_names_only_while_they_stay(checkpoint, tmp_path):
    async def use(client, engine):
        document = (await client.get("/openapi.json")).json()
        chat = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]["model"]
        return chat.get("enum"), LOAD in document["paths"]

    assert serve(checkpoint, use) == ([MODEL, "french"], False)
    updates = {"allow_lora_updates": True, "lora_root": str(tmp_path)}
    assert serve(checkpoint, use, adapters=updates) == (None, True)
    assert serve(checkpoint, use, adapters={"lora_source": str(tmp_path)}) == (None, False)


# Updates


@pytest.fixture
def root(tmp_path):
    """A folder with the adapters good and broken."""
    for name in ("good", "broken"):
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_text(name)
    return tmp_path / "root"


def with_updates(checkpoint, root, use, **settings):
    adapters = {"allow_lora_updates": True, "lora_root": str(root)}
    return serve(checkpoint, use, adapters=adapters, **settings)


def test_an_adapter_is_loaded_named_and_unloaded(checkpoint, root):
    async def use(client, engine):
        chat = GENERATING[0]
        body = {"lora_name": "new", "lora_path": "good"}
        loaded = await client.post(LOAD, json=body)
        assert loaded.status_code == 200
        assert loaded.text == "Success: LoRA adapter 'new' added successfully."
        assert [one.name for one in engine.loaded] == ["new"]
        assert (await client.get("/v1/models/new")).json()["root"] == "good"
        assert (await client.post(chat, json=named(chat, "new"))).status_code == 200
        assert engine.requests[-1].adapter.folder == str(root / "good")
        again = error_of(await client.post(LOAD, json=body), 400)
        assert "load_inplace" in again["message"]
        in_place = await client.post(LOAD, json=body | {"load_inplace": True})
        assert in_place.status_code == 200
        unloaded = await client.post(UNLOAD, json={"lora_name": "new"})
        assert unloaded.text == "Success: LoRA adapter 'new' removed successfully."
        assert engine.unloaded == [engine.loaded[0].digest]
        assert (await client.post(chat, json=named(chat, "new"))).status_code == 404
        error_of(await client.post(UNLOAD, json={"lora_name": "new"}), 404)

    with_updates(checkpoint, root, use)


def test_adapters_of_the_start_can_be_unloaded_too(checkpoint, root):
    async def use(client, engine):
        await client.post(UNLOAD, json={"lora_name": "french"})
        return [card["id"] for card in (await client.get("/v1/models")).json()["data"]]

    assert with_updates(checkpoint, root, use) == [MODEL]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_path": "good"}, 400, "lora_name"),
        ({"lora_name": "", "lora_path": "good"}, 400, "lora_name"),
        ({"lora_name": "a b", "lora_path": "good"}, 400, "lora_name"),
        ({"lora_name": MODEL, "lora_path": "good"}, 400, "lora_name"),
        ({"lora_name": "french", "lora_path": "good"}, 400, "lora_name"),
        ({"lora_name": "broken", "lora_path": "broken"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "../root/../.."}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "none"}, 404, "lora_path"),
        ({"lora_name": "x", "lora_path": "."}, 400, "lora_path"),
    ],
)
def test_a_load_that_cannot_be_done_names_its_field(checkpoint, root, body, status, param):
    async def use(client, engine):
        answer = await client.post(LOAD, json=body)
        assert engine.loaded == []
        return answer

    assert error_of(with_updates(checkpoint, root, use), status)["param"] == param


def test_row_77_updates_are_off_by_default_and_need_the_key(checkpoint, root):
    async def post(client, engine):
        bodies = {LOAD: {"lora_name": "x", "lora_path": "good"}, UNLOAD: {"lora_name": "french"}}
        return [(await client.post(path, json=body)).status_code for path, body in bodies.items()]

    assert serve(checkpoint, post) == [404, 404]
    assert with_updates(checkpoint, root, post, api_keys=["k"]) == [401, 401]


def test_requests_are_counted_by_adapter_and_names_are_bounded(checkpoint, monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr("vlmserve.server.telemetry.adapter_metrics.MAX_LABELS", 1)
    names = ["french", "a", "b"]
    adapters = [ServedAdapter(AdapterRef(one, "/a", one), one, 1, "start") for one in names]

    async def use(client, engine):
        engine.stats.running_adapters = {"french": 2}
        engine.stats.waiting_adapters = {"b": 1, "a": 3}
        for name in [*names, "french", MODEL]:
            await client.post(GENERATING[0], json=named(GENERATING[0], name))
        return (await client.get("/metrics")).text

    text = serve(
        checkpoint, use, adapters={"at_start": adapters}, max_loras=8, metrics_names="vllm"
    )
    assert 'vlmserve_adapter_requests_total{adapter="french"} 2.0' in text
    assert 'vlmserve_adapter_requests_total{adapter="other"} 2.0' in text
    line = next(one for one in text.splitlines() if one.startswith("vllm:lora_requests_info{"))
    labels = 'max_lora="8",running_lora_adapters="french",waiting_lora_adapters="a"'
    assert line.startswith(f"vllm:lora_requests_info{{{labels}}} ")
    assert float(line.split(" ")[1]) > 1e9
