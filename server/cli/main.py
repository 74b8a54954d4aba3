"""The command line: `vlmserve serve`, and `vlmserve bench` beside it.

Owns the commands, their defaults and the lines an operator reads; options.py has
what each option is called and says. Knows nothing of how requests are served;
never imports torch.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from collections.abc import Sequence

import typer

from ... import __version__
from ...router.config import EngineConfig
from ...router.logs import say, set_up_logging
from ...router.messages import EngineReady
from ..bench.command import app as bench_app
from ..images.settings import ImageSettings
from ..settings import ServerSettings
from ..supervisor.engine_watchdog import HangLimits
from ..supervisor.supervisor import SPARE_DELAY_S, Supervision, Supervisor
from ..supervisor.worker_liveness import WorkerLimits
from . import options
from .environment import VariableError, adopt, with_variables, without_effect
from .listener import ListenError, listen
from .model_source import ModelFilesError, resolve_model
from .startup_checks import absolute, check_access, check_files, trace_settings

app = typer.Typer(
    name="vlmserve",
    help="An inference server for Llama-3.2-Vision (Mllama) with an OpenAI-compatible API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")


@app.callback()
def _root() -> None:
    """Keeps `serve` a named command although it is one of few."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command()
@with_variables
def serve(
    model: options.ModelArgument = None,
    revision: options.Revision = None,
    cache_dir: options.CacheDir = None,
    served_model_name: options.ServedModelName = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    quantize: options.Quantize = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    replicas: options.Replicas = 1,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 2048,
    max_num_batched_images: options.MaxNumBatchedImages = 4,
    attention_backend: options.AttentionOption = options.Attention.auto,
    block_size: options.BlockSize = None,
    cuda_graphs: options.CudaGraphs = True,
    kv_cache_memory: options.KvCacheMemory = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    num_image_blocks: options.NumImageBlocks = None,
    prefix_cache: options.PrefixCache = True,
    image_cache: options.ImageCache = True,
    plan_ahead: options.PlanAhead = None,
    num_threads: options.NumThreads = None,
    max_queue_requests: options.MaxQueueRequests = 256,
    max_queue_tokens: options.MaxQueueTokens = 1_048_576,
    max_queue_bytes: options.MaxQueueBytes = 1_073_741_824,
    max_queue_wait: options.MaxQueueWait = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    workers: options.Workers = 1,
    api_key: options.ApiKey = None,
    api_key_file: options.ApiKeyFile = None,
    allowed_host: options.AllowedHost = None,
    cors_origin: options.CorsOrigin = None,
    tls_certfile: options.TlsCertfile = None,
    tls_keyfile: options.TlsKeyfile = None,
    max_connections: options.MaxConnections = 1_000,
    max_head_bytes: options.MaxHeadBytes = 16_384,
    max_headers: options.MaxHeaders = 100,
    max_body_bytes: options.MaxBodyBytes = 67_108_864,
    request_timeout: options.RequestTimeout = 10.0,
    max_request_time: options.MaxRequestTime = 600.0,
    image_position: options.ImagePositionOption = options.ImagePosition.front,
    max_images: options.MaxImages = 16,
    allow_private_image_urls: options.AllowPrivateImageUrls = False,
    unknown_fields: options.UnknownFieldsOption = options.UnknownFields.error,
    drain_time: options.DrainTime = 20.0,
    max_restarts: options.MaxRestarts = 5,
    max_step_stall: options.MaxStepStall = 10.0,
    max_worker_stall: options.MaxWorkerStall = 10.0,
    spare_engine: options.SpareEngine = True,
    log_level: options.LogLevelOption = options.LogLevel.info,
    log_format: options.LogFormatOption = options.LogFormat.text,
    log_requests: options.LogRequests = True,
    otel: options.Otel = None,
    otel_service_name: options.OtelServiceName = None,
    otlp_endpoint: options.OtlpEndpoint = None,
) -> None:
    """Serve a model until Ctrl-C.

    Each option may be set by a variable too: --max-images by VLMSERVE_MAX_IMAGES.
    """
    set_up_logging(log_level.value, log_format.value, "supervisor")
    for line in without_effect(os.environ, inspect.signature(serve).parameters):
        say(f"vlmserve: {line}", logging.WARNING)
    try:
        folder = resolve_model(model, revision, cache_dir)
        engine = EngineConfig(
            model=str(folder.path),
            socket_path="",
            device=device,
            dtype=dtype.value,
            device_map=device_map,
            max_memory=max_memory,
            quantize=None if quantize is None else quantize.value,
            tensor_parallel_size=tensor_parallel_size,
            num_replicas=replicas,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_batched_images=max_num_batched_images,
            attention_backend=attention_backend.value,
            block_size=block_size,
            cuda_graphs=cuda_graphs,
            kv_cache_bytes=kv_cache_memory,
            gpu_memory_utilization=gpu_memory_utilization,
            num_image_blocks=num_image_blocks,
            prefix_cache=prefix_cache,
            image_cache=image_cache,
            plan_ahead=plan_ahead,
            num_threads=num_threads,
            max_queue_requests=max_queue_requests,
            max_queue_tokens=max_queue_tokens,
            max_queue_bytes=max_queue_bytes,
            log_level=log_level.value,
            log_format=log_format.value,
            max_queue_wait_s=max_queue_wait,
            parent_pid=os.getpid(),
        )
        settings = ServerSettings(
            model=str(folder.path),
            engine_socket="",
            served_model_names=_names(served_model_name) or [folder.name],
            hub_id=folder.name if "/" in folder.name else None,
            api_keys=api_key or [],
            api_key_file=absolute(api_key_file),
            allowed_hosts=allowed_host or [],
            cors_origins=cors_origin or [],
            tls_certfile=absolute(tls_certfile),
            tls_keyfile=absolute(tls_keyfile),
            log_level=log_level.value,
            log_format=log_format.value,
            log_requests=log_requests,
            traces=trace_settings(otel, otlp_endpoint, otel_service_name, os.environ),
            max_num_seqs=max_num_seqs,
            max_connections=max_connections,
            max_head_bytes=max_head_bytes,
            max_headers=max_headers,
            max_body_bytes=max_body_bytes,
            request_timeout_s=request_timeout,
            max_request_time_s=max_request_time,
            images=ImageSettings(
                max_images=max_images, allow_private_addresses=allow_private_image_urls
            ),
            image_position="front" if image_position is options.ImagePosition.front else "as-sent",
            unknown_fields="error" if unknown_fields is options.UnknownFields.error else "ignore",
        )
        check_access(settings)
        check_files(settings)
        listener = listen(host, port)
    except (ModelFilesError, ListenError, ValueError) as error:
        raise _failure(str(error)) from error
    port = listener.getsockname()[1]
    name = settings.model_name
    say(f"vlmserve {__version__}: loading {name}")
    scheme = "http" if settings.tls_certfile is None else "https"

    def say_ready(infos: Sequence[EngineReady]) -> None:
        _say_ready(f"{scheme}://{_shown_host(host)}:{port}", name, infos)

    supervision = Supervision(
        num_workers=workers,
        drain_time_s=drain_time,
        max_restarts=max_restarts,
        hang_limits=HangLimits(step_s=max_step_stall),
        worker_limits=WorkerLimits(stall_s=max_worker_stall),
        spare_delay_s=SPARE_DELAY_S if spare_engine else None,
    )
    with listener:
        supervisor = Supervisor(engine, settings, listener, say_ready, supervision)
        raise typer.Exit(asyncio.run(supervisor.run()))


def _say_ready(url: str, name: str, infos: Sequence[EngineReady]) -> None:
    """One line, with each engine's place and room."""
    shown = [
        f"{one.device} {one.dtype}, context {one.max_model_len:,}, room for "
        f"{one.num_text_tokens:,} text tokens and {one.num_image_tiles:,} image tiles"
        for one in infos
    ]
    if len(shown) > 1:
        shown = [f"replica {number}: {text}" for number, text in enumerate(shown)]
    say(f"vlmserve is ready on {url} (model {name}, {'; '.join(shown)})")


def _names(given: list[str] | None) -> list[str]:
    """The names of all values, each of which may hold several between commas; none twice."""
    names = [name.strip() for value in given or [] for name in value.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _failure(line: str) -> typer.Exit:
    say(f"vlmserve: {line}", logging.ERROR)
    return typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    try:
        adopt(os.environ)
    except VariableError as error:
        say(f"vlmserve: {error}", logging.ERROR)
        sys.exit(1)
    app()
