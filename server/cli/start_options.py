"""The options of `vlmserve serve` that neither the engine nor a worker needs by that name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from ...models.settings.option import Option
from ...models.settings.runner_config import ADAPTERS, ENGINE, MODEL
from ...router.config import LOG
from ..images.settings import HTTP
from ..settings import ACCESS
from ..supervisor.settings import FAULTS

# The order of the headings in --help and docs/settings.md.
GROUPS = (MODEL, ENGINE, ADAPTERS, HTTP, ACCESS, FAULTS, LOG)


@dataclass(frozen=True, slots=True)
class StartOptions:
    """What finds the model, opens the socket and sets up traces."""

    model: Annotated[
        str | None,
        Option(
            "A model folder or hub id. Default: the small bundled model.", MODEL, is_argument=True
        ),
    ] = None
    revision: Annotated[
        str | None, Option("Branch, tag or commit of the hub repository.", MODEL)
    ] = None
    cache_dir: Annotated[
        str | None,
        Option("Folder for downloads from the hub. Default: the hub's cache in HF_HOME.", MODEL),
    ] = None
    lora: Annotated[
        list[str],
        Option(
            "A LoRA adapter, and the name by which requests choose it as their model; repeatable. "
            "vLLM's JSON form works too.",
            ADAPTERS,
            metavar="NAME=FOLDER|HUB_ID",
        ),
    ] = field(default_factory=list)
    host: Annotated[str, Option("Address to listen on.", HTTP)] = "127.0.0.1"
    port: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=65_535)],
        Option("Port to listen on; 0 picks a free one.", HTTP),
    ] = 8000
    metrics_port: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=65_535)] | None,
        Option(
            "Another port, in plain HTTP, for health checks and metrics only. It needs no API "
            "key: keep it inside your network. Default: none.",
            HTTP,
        ),
    ] = None
    ray: Annotated[
        str | None,
        Option(
            "Run on a cluster of Ray (needs vlmserve[ray]) at this address, such as 10.0.0.1:6379. "
            "auto, or no address: the cluster that this machine belongs to. local: a new one, on "
            "loopback. --replicas is then the number of engines in the cluster.",
            MODEL,
            metavar="ADDRESS",
        ),
    ] = None
    max_replicas: Annotated[
        Annotated[int, msgspec.Meta(ge=1)] | None,
        Option(
            "With --ray: scale from --replicas up to this number by running and waiting requests. "
            "Default: a fixed number.",
            MODEL,
        ),
    ] = None
    otel: Annotated[
        bool | None,
        Option(
            "Send OpenTelemetry traces (needs vlmserve[otel]). Default: on if an endpoint is set.",
            LOG,
        ),
    ] = None
    otel_service_name: Annotated[
        str | None,
        Option("Service name in traces. Default: OTEL_SERVICE_NAME, or vlmserve.", LOG),
    ] = None
    otlp_endpoint: Annotated[
        str | None,
        Option(
            "URL for traces by OTLP over HTTP, such as http://collector:4318. Default: "
            "OTEL_EXPORTER_OTLP_ENDPOINT, or http://localhost:4318 with --otel.",
            LOG,
        ),
    ] = None
