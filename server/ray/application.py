"""The application of Ray Serve: an ingress and the replicas of engines, with their settings.

    serve run vlmserve.server.ray.application:app model=meta-llama/Llama-3.2-11B-Vision-Instruct

`deploy/ray/` has files for `serve run` and `serve deploy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.deployment import Application

from ...models.batch import Positive
from ...models.settings.option_parser import Declaration, declarations, variable_of
from ...router.config import EngineConfig
from ..adapters.names import parse
from ..settings import ServerSettings
from ..supervisor.settings import SupervisorSettings
from .engine_replica import EngineReplica
from .ingress import Ingress, IngressLimits
from .request_router import AffinityRouter

SETTINGS = (EngineConfig, ServerSettings, SupervisorSettings)
# What else a replica's server takes: options of `cli/start_options.py`.
START_OPTIONS = frozenset(
    ("model", "revision", "cache_dir", "lora", "otel", "otel_service_name", "otlp_endpoint")
)
# Options that Ray's part replaces; see docs/how-to/ray.md.
NOT_HERE = {
    "host": "the address is Serve's: http_options in the YAML",
    "port": "the port is Serve's: http_options in the YAML",
    "metrics_port": "/metrics of the ingress has the sums over all replicas",
    "replicas": "give replicas and max_replicas beside options",
    "replica_name": "Ray names the replicas",
    "tls_certfile": "TLS is Serve's: http_options in the YAML",
    "tls_keyfile": "TLS is Serve's: http_options in the YAML",
    "log_format": "Ray writes the log",
    "allow_lora_updates": "a request would reach one replica only: give lora or lora_source",
    "lora_root": "requests load no adapters here: give lora or lora_source",
    "ray": "the cluster is chosen by the command",
    "max_replicas": "give max_replicas beside options",
}
# The arguments as JSON; see `built.py`.
ARGS_VARIABLE = "VLMSERVE_RAY_ARGS"
# Requests that a replica may have beside those of its batch and its queue: health checks, metrics.
SPARE_REQUESTS = 64
# Beyond the longest request: to end the processes.
CLOSING_TIME_S = 30.0
STATS_PERIOD_S, STATS_TIMEOUT_S = 1.0, 10.0


class RayApplication(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The arguments of `app`.

    options: of `vlmserve serve`, by name. replicas, max_replicas: engines at least and at most;
    without max_replicas their number is fixed. target_share: Ray adds a replica when each has more
    open requests than this share of --max-num-seqs. autoscaling: further fields of Ray's
    AutoscalingConfig. gpus, cpus: what a replica takes of a node.
    ingresses, max_ingresses, ingress_cpus: the processes that route. surge_percent: the replicas
    that an update may start before it stops old ones, of their number, rounded up; by default one
    for a single replica, else none. unready_limit_s: see EngineReplica.
    """

    model: str | None = None
    options: dict[str, Any] = {}
    replicas: Positive = 1
    max_replicas: Positive | None = None
    target_share: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.75
    autoscaling: dict[str, Any] = {}
    gpus: Annotated[float, msgspec.Meta(ge=0)] | None = None
    cpus: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    ingresses: Positive = 1
    ingress_cpus: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_ingresses: Positive | None = None
    surge_percent: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    unready_limit_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0


def app(args: Mapping[str, Any]) -> Application:
    """The application. Raises ValueError, one line, for arguments that it does not take."""
    try:
        given = msgspec.convert(dict(args), RayApplication, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"the application's arguments: {error}") from error
    return application(given)


def application(given: RayApplication) -> Application:
    """The same, of checked arguments. Raises ValueError."""
    if given.max_replicas is not None and given.max_replicas < given.replicas:
        raise ValueError(
            f"max_replicas is {given.max_replicas}, replicas is {given.replicas}: raise the first"
            " or lower the second"
        )
    options = given.options | ({} if given.model is None else {"model": given.model})
    variables = variables_of(options)
    drain_s = _setting(options, "drain_time")
    longest_s = _setting(options, "max_request_time") + drain_s + CLOSING_TIME_S
    max_num_seqs = int(_setting(options, "max_num_seqs"))
    max_ongoing = max_num_seqs + int(_setting(options, "max_queue_requests")) + SPARE_REQUESTS
    engines = serve.deployment(
        name="engine",
        max_ongoing_requests=max_ongoing,
        autoscaling_config=_scaling(given, max_num_seqs),
        num_replicas=_fixed(given.replicas, given.max_replicas),
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": _gpus(given, options)},
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=longest_s,
        max_surge_percent=_surge(given),
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter,
            request_router_kwargs={"max_num_seqs": max_num_seqs},
            request_routing_stats_period_s=STATS_PERIOD_S,
            request_routing_stats_timeout_s=STATS_TIMEOUT_S,
        ),
    )(EngineReplica)
    most = given.max_replicas or given.replicas
    ingress = serve.deployment(
        name="ingress",
        # Each has the open requests of all engines in the worst case.
        max_ongoing_requests=max_ongoing * most,
        autoscaling_config=_ingress_scaling(given, max_num_seqs),
        num_replicas=_fixed(given.ingresses, given.max_ingresses),
        ray_actor_options={"num_cpus": given.ingress_cpus},
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=longest_s,
        max_surge_percent=100,
    )(Ingress)
    limits = IngressLimits(
        int(_setting(options, "max_body_bytes")), int(_setting(options, "max_bytes_in_flight"))
    )
    # A node's own variables must not reach into what Ray's part replaces.
    cleared = dict.fromkeys([*map(variable_of, NOT_HERE), ARGS_VARIABLE], "")
    bound = engines.bind(cleared | variables, drain_s + CLOSING_TIME_S, given.unready_limit_s)
    return ingress.bind(bound, limits, _adapters(options))


def _adapters(options: Mapping[str, Any]) -> frozenset[str]:
    """The names of the adapters of --lora. Raises ValueError."""
    given = options.get("lora") or []
    values = given.split() if isinstance(given, str) else given
    return frozenset(parse(value).name for value in values)


def variables_of(options: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables that set these options. Raises ValueError for an unknown one."""
    known = {declared.parameter for declared in _declared()} | START_OPTIONS
    for name in options:
        if name in NOT_HERE:
            raise ValueError(f"{name} does not apply on Ray: {NOT_HERE[name]}")
        if name not in known:
            raise ValueError(f"{name} is not an option of vlmserve serve: see docs/settings.md")
    return {
        variable_of(name): _text_of(name, value)
        for name, value in options.items()
        if value is not None
    }


def _text_of(name: str, value: Any) -> str:
    """A value as an environment variable has it. Raises ValueError for a list it cannot have."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ",".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        texts = [str(item) for item in value]
        if any(len(text.split()) != 1 for text in texts):
            raise ValueError(f"{name}: a value on Ray is not empty and contains no blank")
        return " ".join(texts)
    return str(value)


def _declared() -> Iterator[Declaration]:
    for kind in SETTINGS:
        yield from declarations(kind)


def _setting(options: Mapping[str, Any], name: str) -> float:
    """The number that an option has, given or by default."""
    if (value := options.get(name)) is not None:
        return float(value)
    return float(next(one.default for one in _declared() if one.parameter == name))


def _gpus(given: RayApplication, options: Mapping[str, Any]) -> float:
    """The GPUs of one replica: as given, or those of --tensor-parallel-size if there are any."""
    if given.gpus is not None:
        return given.gpus
    if str(options.get("device", "")).startswith("cpu"):
        return 0.0
    if ray.is_initialized() and not ray.cluster_resources().get("GPU"):
        return 0.0
    return _setting(options, "tensor_parallel_size")


def _surge(given: RayApplication) -> int:
    """Ray stops old replicas first, which a single one's requests would have to wait for."""
    if given.surge_percent is not None:
        return given.surge_percent
    return 1 if given.replicas == 1 else 0


def _fixed(least: int, most: int | None) -> int | None:
    return least if most is None else None


def _scaling(given: RayApplication, max_num_seqs: int) -> AutoscalingConfig | None:
    """By open requests, running and waiting alike."""
    if given.max_replicas is None:
        return None
    return AutoscalingConfig(
        **{
            "min_replicas": given.replicas,
            "max_replicas": given.max_replicas,
            "target_ongoing_requests": max(1.0, given.target_share * max_num_seqs),
            **given.autoscaling,
        }
    )


def _ingress_scaling(given: RayApplication, max_num_seqs: int) -> AutoscalingConfig | None:
    if given.max_ingresses is None:
        return None
    return AutoscalingConfig(
        min_replicas=given.ingresses,
        max_replicas=given.max_ingresses,
        target_ongoing_requests=2.0 * max_num_seqs,
    )
