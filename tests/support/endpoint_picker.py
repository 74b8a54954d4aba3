"""A stand-in for llm-d's endpoint picker, written from its documentation.

    python endpoint_picker.py ENDPOINTS.yaml EPP.yaml PORT

Reads endpoints from a file, and again when it changes; scrapes each one's /metrics as the
model-server protocol demands; scores them by the profile's plugins; answers Envoy's external
processing with the header x-gateway-destination-endpoint. Prints one JSON line a scrape. Runs in
the environment of requirements/gateways/envoy.txt, so it imports nothing of this project.

Sources: llm-d/llm-d-router, docs/model-server-protocol.md and the plugins' README files.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import yaml
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as messages
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as services

SCRAPE_INTERVAL_S = 0.2
MAX_CHUNK_BYTES = 62_000
DESTINATION = "x-gateway-destination-endpoint"
GAUGES = {
    "waiting": "vllm:num_requests_waiting",
    "running": "vllm:num_requests_running",
    "kv": "vllm:kv_cache_usage_perc",
}
CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\} 1\.0$", re.MULTILINE)


def read_metrics(text: str) -> dict[str, float]:
    """What the protocol names. Raises KeyError if a gauge is missing or of another type."""
    found = {}
    for name, metric in GAUGES.items():
        if f"# TYPE {metric} gauge\n" not in text:
            raise KeyError(metric)
        # The first series of a name, never a sum.
        series = re.search(rf"^{re.escape(metric)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        if series is None:
            raise KeyError(metric)
        found[name] = float(series[1])
    labels = CACHE.search(text)
    if labels is None:
        raise KeyError("vllm:cache_config_info")
    for name in ("block_size", "num_gpu_blocks"):
        value = re.search(rf'\b{name}="(\d+)"', labels[1])
        if value is None:
            raise KeyError(name)
        found[name] = float(value[1])
    return found


def pictures_of(body: bytes) -> set[str]:
    """Hashes of the media blocks of a chat completion."""
    try:
        turns = json.loads(body)["messages"]
    except (ValueError, KeyError, TypeError):
        return set()
    parts = [
        part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part.get("type") == "image_url"]
    return {hashlib.sha256(url.encode()).hexdigest() for url in urls}


class Picker:
    """Knows the endpoints, their figures, and which pictures were sent to which."""

    def __init__(self, file: Path, weights: dict[str, float]) -> None:
        self._file, self._weights = file, weights
        self._figures: dict[str, dict[str, float]] = {}
        self._seen: dict[str, set[str]] = defaultdict(set)
        self._turn = 0
        self._lock = threading.Lock()

    def scrape_forever(self) -> None:
        while True:
            figures = {}
            for one in yaml.safe_load(self._file.read_text())["endpoints"]:
                address = f"{one['address']}:{one['port']}"
                try:
                    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                        figures[address] = read_metrics(answer.read().decode())
                except (OSError, KeyError) as error:
                    print(json.dumps({"address": address, "error": repr(error)}), flush=True)
            self._figures = figures
            print(json.dumps(figures), flush=True)
            time.sleep(SCRAPE_INTERVAL_S)

    def pick(self, body: bytes) -> str:
        """The best endpoint for a body; the least recently picked of equals."""
        pictures = pictures_of(body)
        with self._lock:
            self._turn += 1
            addresses = sorted(self._figures)
            order = addresses[self._turn % len(addresses) :] + addresses
            best = max(dict.fromkeys(order), key=lambda address: self._score(address, pictures))
            self._seen[best] |= pictures
        return best

    def _score(self, address: str, pictures: set[str]) -> float:
        figures = self._figures[address]
        queues = [one["waiting"] for one in self._figures.values()]
        spread = max(queues) - min(queues)
        known = len(pictures & self._seen[address])
        scores = {
            "mm-embeddings-cache-scorer": known / len(pictures) if pictures else 0.0,
            "queue-scorer": (max(queues) - figures["waiting"]) / spread if spread else 1.0,
            "kv-cache-utilization-scorer": 1.0 - figures["kv"],
        }
        return sum(self._weights.get(name, 0.0) * score for name, score in scores.items())


def chunks(body: bytes):
    """A request's body as it came, in messages."""
    for start in range(0, len(body), MAX_CHUNK_BYTES):
        part = body[start : start + MAX_CHUNK_BYTES]
        yield streamed(part, start + MAX_CHUNK_BYTES >= len(body))


def streamed(body: bytes, is_last: bool) -> messages.BodyResponse:
    mutation = messages.BodyMutation(
        streamed_response=messages.StreamedBodyResponse(body=body, end_of_stream=is_last)
    )
    return messages.BodyResponse(response=messages.CommonResponse(body_mutation=mutation))


def sent_to(address: str) -> messages.ProcessingResponse:
    header = base_pb2.HeaderValue(key=DESTINATION, raw_value=address.encode())
    mutation = messages.HeaderMutation(set_headers=[base_pb2.HeaderValueOption(header=header)])
    common = messages.CommonResponse(header_mutation=mutation, clear_route_cache=True)
    return messages.ProcessingResponse(request_headers=messages.HeadersResponse(response=common))


class Processor(services.ExternalProcessorServicer):
    def __init__(self, picker: Picker) -> None:
        self._picker = picker

    def Process(self, request_iterator, context):
        body = bytearray()
        answer = messages.ProcessingResponse
        for message in request_iterator:
            kind = message.WhichOneof("request")
            if kind == "request_headers":
                if message.request_headers.end_of_stream:
                    yield sent_to(self._picker.pick(b""))
            elif kind == "request_body":
                body += message.request_body.body
                if message.request_body.end_of_stream:
                    yield sent_to(self._picker.pick(bytes(body)))
                    for part in chunks(bytes(body)):
                        yield answer(request_body=part)
            elif kind == "response_headers":
                yield answer(response_headers=messages.HeadersResponse())
            elif kind == "response_body":
                part = message.response_body
                yield answer(response_body=streamed(part.body, part.end_of_stream))
            elif kind == "request_trailers":
                yield answer(request_trailers=messages.TrailersResponse())
            elif kind == "response_trailers":
                yield answer(response_trailers=messages.TrailersResponse())


def main() -> None:
    endpoints, config, port = sys.argv[1:]
    (profile,) = yaml.safe_load(Path(config).read_text())["schedulingProfiles"]
    weights = {one["pluginRef"]: one["weight"] for one in profile["plugins"]}
    picker = Picker(Path(endpoints), weights)
    server = grpc.server(ThreadPoolExecutor(32))
    services.add_ExternalProcessorServicer_to_server(Processor(picker), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    picker.scrape_forever()


if __name__ == "__main__":
    main()
