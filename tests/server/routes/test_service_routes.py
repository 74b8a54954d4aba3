"""The documented service beyond chat: names, version, licence, manifest, metadata, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
    write_checkpoint,
)
from support.invariants import CHAT, GENERATION_ROUTES, PICTURE, body_for

from vlmserve import __version__
from vlmserve.router.messages import VISION_BOUNDS_S, EngineStats
from vlmserve.server.telemetry.engine_metrics import engine_families
from vlmserve.server.telemetry.event_loop_lag import watch_lag
from vlmserve.server.telemetry.metrics import Metrics

TOKENIZER = meta_like_tokenizer()
LICENSE = "A licence of this checkpoint alone.\nÜ\n"
# What the documented service calls its figures, and what each is.
DOCUMENTED = {
    "gpu_cache_usage_perc": "gauge",
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "num_request_max": "gauge",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "time_to_first_token_seconds": "histogram",
    "time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "vision_encoder_latency_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_finish": "counter",
    "request_success": "counter",
    "request_failure": "counter",
}
USUAL = {
    "inter_token_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_params_n": "histogram",
    "request_params_max_tokens": "histogram",
    "request_images": "histogram",
    "image_load_time_seconds": "histogram",
    "vlmserve_event_loop_lag_seconds": "histogram",
    "vlmserve_http_requests": "counter",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "kv_cache_usage_perc": "gauge",
}


@pytest.fixture
def licensed(tmp_path):
    folder = write_checkpoint(tmp_path / "licensed")
    (folder / "LICENSE.txt").write_text(LICENSE, "utf-8")
    return folder


def served(checkpoint, use, *, script=None, **settings):
    async def run():
        fake = ScriptedEngine(
            script or (lambda request: list(tokens_one_by_one(TOKENIZER, "What?")))
        )
        async with client_of(checkpoint, fake, **settings) as client:
            return await use(client, fake)

    return asyncio.run(run())


def get(checkpoint, path, **settings):
    async def use(client, engine):
        return await client.get(path)

    return served(checkpoint, use, **settings)


def body_of(path, **more):
    body = body_for(path, **more)
    return body | {name: MODEL for name in ("model", "model_id") if name in body}


# What the service tells of itself


def test_version_has_the_documented_keys(checkpoint):
    assert get(checkpoint, "/v1/version").json() == {"release": __version__, "api": "1.0.0"}


def test_the_licence_is_the_checkpoints_own_file(licensed):
    answer = get(licensed, "/v1/license", hub_id="owner/model")
    assert answer.json() == {
        "name": "LICENSE.txt",
        "path": "LICENSE.txt",
        "sha": hashlib.sha1(LICENSE.encode()).hexdigest(),
        "size": len(LICENSE),
        "url": "https://huggingface.co/owner/model/blob/main/LICENSE.txt",
        "type": "file",
        "content": LICENSE,
    }
    assert list(answer.json()) == ["name", "path", "sha", "size", "url", "type", "content"]
    assert str(licensed) not in answer.text


def test_without_a_licence_there_is_none(checkpoint):
    answer = get(checkpoint, "/v1/license")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "no_license"


def test_metadata_names_what_is_served(licensed, checkpoint):
    answer = get(licensed, "/v1/metadata", hub_id="owner/model").json()
    keys = ["assetInfo", "licenseInfo", "modelInfo", "repository_override", "version"]
    assert list(answer) == [*keys, "selectedModelProfileId"]
    assert answer["assetInfo"] == []
    assert list(answer["licenseInfo"]) == ["name", "path", "sha", "size", "url", "type"]
    assert answer["modelInfo"] == [
        {"modelUrl": "https://huggingface.co/owner/model", "shortName": MODEL}
    ]
    assert answer["version"] == __version__
    config = (licensed / "config.json").read_bytes()
    assert answer["selectedModelProfileId"] == hashlib.sha256(config).hexdigest()
    local = get(checkpoint, "/v1/metadata").json()
    assert local["modelInfo"][0]["modelUrl"] == local["licenseInfo"]["url"] == ""
    assert local["licenseInfo"]["size"] == 0


@pytest.mark.parametrize("prefix", ["/", "/get_"])
def test_sglangs_router_finds_the_models_name_and_kind(tmp_path, prefix):
    """Without them it lists the model as `unknown`."""
    folder = write_checkpoint(tmp_path / "named")
    config = json.loads((folder / "config.json").read_text())
    kind = {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config | kind))

    async def use(client, engine):
        return [(await client.get(f"{prefix}{name}_info")).json() for name in ("server", "model")]

    server, model = served(folder, use, served_model_names=["one", "two"], max_num_seqs=7)
    assert server == {
        "served_model_name": "one",
        "dp_size": 1,
        "max_running_requests": 7,
        "version": __version__,
    }
    about = {"is_generation": True, "has_image_understanding": True}
    assert model == {"model_path": "one", "tokenizer_path": "one", **about, **kind}
    assert get(folder, "/model_info", hub_id="owner/model").json()["model_path"] == "owner/model"


def test_the_manifest_lists_the_models_files_and_no_others(licensed):
    (licensed / "pytorch_model.bin").write_bytes(b"no")
    (licensed / "model.safetensors").write_bytes(b"12345")
    answer = get(licensed, "/v1/manifest").json()
    assert list(answer) == ["manifest_file"]
    files = {one["name"]: one["size_bytes"] for one in json.loads(answer["manifest_file"])["files"]}
    assert files["model.safetensors"] == 5
    assert {"config.json", "tokenizer.json", "LICENSE.txt", "chat_template.jinja"} <= set(files)
    assert "pytorch_model.bin" not in files


# Names


@pytest.mark.parametrize("path", GENERATION_ROUTES)
def test_every_alias_is_served_and_the_list_has_all(checkpoint, path):
    async def use(client, engine):
        statuses = []
        for name in ("first", "second/name", "third"):
            body = body_of(path)
            named = {key: name for key in ("model", "model_id") if key in body}
            statuses.append((await client.post(path, json=body | named)).status_code)
        return statuses, (await client.get("/v1/models")).json()["data"]

    names = ["first", "second/name"]
    statuses, cards = served(checkpoint, use, served_model_names=names)
    assert statuses == [200, 200, 404]
    assert [card["id"] for card in cards] == names
    assert {card["root"] for card in cards} == {"first"}


# Metrics


def families_of(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize("path", ["/metrics", "/v1/metrics"])
def test_metrics_have_every_documented_name_and_the_usual_ones(checkpoint, path):
    families = families_of(get(checkpoint, path).text)
    types = {name: family.type for name, family in families.items()}
    assert (DOCUMENTED | USUAL).items() <= types.items()
    (finished,) = [families["request_finish"]]
    reasons = {sample.labels["finished_reason"] for sample in finished.samples}
    assert reasons == {"stop", "length", "tool_calls", "abort", "error"}
    own = {name for name in types if name.startswith("vlmserve_")}
    assert set(types) - own <= set(DOCUMENTED | USUAL)


def test_figures_of_a_request_are_counted_where_they_belong(checkpoint):
    async def use(client, engine):
        engine.stats = EngineStats(
            text_blocks_used=1, text_blocks_total=4, vision_seconds=0.5,
            vision_step_counts=[0, 2, 1, *[0] * (len(VISION_BOUNDS_S) - 2)],
        )  # fmt: skip
        for path in GENERATION_ROUTES:
            await client.post(path, json=body_of(path, images=[PICTURE], max_tokens=8))
        return (await client.get("/metrics")).text

    families = families_of(served(checkpoint, use))
    num = len(GENERATION_ROUTES)
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    for name in ("request_queue_time", "request_prefill_time", "request_decode_time",
                 "request_inference_time", "e2e_request_latency", "time_to_first_token",
                 "image_load_time"):  # fmt: skip
        assert values[f"{name}_seconds_count",] == num, name
    assert values["inter_token_latency_seconds_count",] == num * 2
    assert values["request_images_sum",] == num
    assert values["request_params_n_sum",] == num
    assert values["request_params_max_tokens_sum",] == num * 8
    assert values["request_finish_total", "stop"] == num
    assert values["vision_encoder_latency_seconds_count",] == 3
    assert values["vision_encoder_latency_seconds_sum",] == 0.5
    assert values["vision_encoder_latency_seconds_bucket", "0.01"] == 2
    assert values["vlmserve_http_requests_total", "POST", CHAT, "200"] == 1


def test_what_workers_tell_alike_is_said_and_all_else_can_be_summed():
    metrics = Metrics(8)
    families = list(metrics.registry.collect())
    own = [family for family in families if family.name not in engine_families()]
    assert {family.type for family in own} == {"counter", "histogram"}
    assert len(own) > 15
    assert isinstance(metrics.registry, CollectorRegistry)


def test_the_event_loops_lag_is_measured():
    """A loop that is held up for a while tells at least of that while."""
    seen = []

    async def run():
        loop = asyncio.get_running_loop()
        told = asyncio.Event()

        def observe(lag_s):
            seen.append(lag_s)
            told.set()

        task = asyncio.create_task(watch_lag(observe, 0.01))
        await told.wait()
        told.clear()
        began = loop.time()
        while loop.time() - began < 0.2:
            pass  # as a callback that computes would
        await told.wait()
        task.cancel()

    asyncio.run(run())
    assert max(seen) >= 0.15
    assert min(seen) >= 0


# Row 53


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ({}, 200),
        ({"heartbeat_age_s": 2.5}, 503),
        ({"heartbeat_age_s": 1.5}, 200),
        ({"is_ready": False}, 503),
        ({"stall_s": 3.5}, 503),
        ({"stall_s": 2.5}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/v1/health/ready", "/health"])
def test_row_53_ready_follows_the_heartbeat_and_live_the_loop(checkpoint, path, state, status):
    async def use(client, engine):
        for name, value in state.items():
            setattr(engine, name, value)
        return await client.get(path), await client.get("/v1/health/live")

    ready, live = served(checkpoint, use)
    assert (ready.status_code, live.status_code) == (status, 200)
    if status == 503:
        assert ready.json()["message"] == "Service is not ready."
