"""`--metrics-names vllm`: what routers, autoscalers and dashboards for vLLM read."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from vlmserve.router.messages import EngineStats
from vlmserve.server.telemetry.metrics import Metrics
from vlmserve.server.telemetry.vllm_names import RENAMED, SAME_NAME

LABELS = {"model_name": "m", "engine": "0"}
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    text_blocks_used=5,
    text_blocks_total=20,
    block_size=16,
    image_cache_hits=4,
    image_cache_misses=6,
    num_drafts=3,
    num_draft_tokens=9,
    num_accepted_tokens=5,
)


def samples_of(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = metrics.render(STATS).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_vllm_name_has_the_figures_of_the_ordinary_one(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    metrics = Metrics(num_request_max=1, vllm_model="m")
    metrics.prompt_tokens.inc(7)
    metrics.time_to_first_token.observe(0.3)
    metrics.request_finish.labels("stop").inc(2)
    found = samples_of(metrics)
    names = SAME_NAME | RENAMED.keys()
    twins = 0
    for (name, labels), value in found.items():
        family = next((one for one in names if name.startswith(one)), None)
        if family is None:
            continue
        twin = "vllm:" + RENAMED.get(family, family) + name.removeprefix(family)
        assert found[twin, frozenset(labels | LABELS.items())] == value, twin
        twins += 1
    assert twins > 100
    assert found["vllm:num_requests_running", frozenset(LABELS.items())] == 3
    assert found["vllm:num_requests_waiting", frozenset(LABELS.items())] == 2
    assert found["vllm:kv_cache_usage_perc", frozenset(LABELS.items())] == 0.25
    assert found["vllm:prompt_tokens_total", frozenset(LABELS.items())] == 7
    stopped = LABELS | {"finished_reason": "stop"}
    assert found["vllm:request_success_total", frozenset(stopped.items())] == 2
    assert found["vllm:mm_cache_queries_total", frozenset(LABELS.items())] == 10
    assert found["vllm:mm_cache_hits_total", frozenset(LABELS.items())] == 4
    assert found["vllm:spec_decode_num_drafts_total", frozenset(LABELS.items())] == 3
    assert found["vllm:spec_decode_num_draft_tokens_total", frozenset(LABELS.items())] == 9
    assert found["vllm:spec_decode_num_accepted_tokens_total", frozenset(LABELS.items())] == 5
    assert found["vlmserve_accepted_draft_tokens_total", frozenset()] == 5
    ((settings, one),) = [
        (dict(labels), value) for (name, labels), value in found.items() if "cache_config" in name
    ]
    assert one == 1
    assert (settings["block_size"], settings["num_gpu_blocks"]) == ("16", "20")


def test_without_the_option_no_name_is_vllms(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert b"vllm" not in Metrics(num_request_max=1).render(STATS)
