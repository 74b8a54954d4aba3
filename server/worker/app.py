"""Builds one worker's Sanic application: routes, header checks, errors, and its components.

Owns Sanic's configuration, and the order in which components start and stop with the server.
Knows nothing of processes or of where the listening socket comes from.
"""

from __future__ import annotations

import asyncio
import datetime
import functools
import os
import signal
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from sanic import HTTPResponse, Request, Sanic

from ... import __version__
from ...router.client.replica_pool import ReplicaPool
from ...router.processes.tasks import end_tasks
from ..adapters.adapters import WorkerAdapters
from ..admission.bytes_in_flight import (
    BytesInFlight,
    release_current_reservation,
    set_current_reservation,
)
from ..admission.lanes import GRAMMARS, IMAGE_DECODERS, IMAGE_FETCHES, NAME_LOOKUPS, Lanes
from ..admission.rate_limits import RateLimits
from ..admission.worker_memory import WorkerMemory
from ..api.answer_headers import name_origin
from ..api.endpoint import Routes
from ..api.error_answers import answer_error
from ..api.ignored_fields import name_ignored
from ..api.openapi import document
from ..api.response_store import IN_MEMORY, ResponseStore
from ..api.services import Services, check_text, context_of, services_of
from ..generation.engine_connection import EngineConnection
from ..generation.generator import Engine, Generator, Images
from ..http.auth import Access, keyless_paths, shared_folder
from ..http.connection_places import (
    MAX_LINGERING,
    NUM_PROBE_PLACES,
    NUM_RESERVED_PLACES,
    ConnectionPlaces,
)
from ..http.drain import Drain
from ..http.head import HeadLimits
from ..http.protocol import LenientRequest, receive_body
from ..http.sanic_config import sanic_config
from ..images.decoders import DecoderPool
from ..images.fetch import ImageFetcher
from ..images.loader import ImageLoader
from ..images.names import MAX_LOOKUPS
from ..images.tiling import TilingConfig
from ..prompts.processor import Processor
from ..prompts.templates.environment import Clock
from ..routes import (
    adapters,
    chat,
    completions,
    health,
    llama_stack,
    messages,
    moderations,
    pages,
    render,
    responses,
    service,
    tokenization,
)
from ..settings import ServerSettings
from ..structured_output.compile_checks import NUM_CHILDREN, GrammarChecks
from ..telemetry.event_loop_lag import watch_lag
from ..telemetry.metrics import Metrics
from ..telemetry.recorded_app import RecordedApp
from ..telemetry.request_log import RequestLog
from ..telemetry.request_record import RequestRecord, note_replica, record_of

if TYPE_CHECKING:
    from ..telemetry.tracing import Tracer

ROUTES = (
    chat.ROUTES,
    completions.ROUTES,
    responses.ROUTES,
    messages.ROUTES,
    llama_stack.ROUTES,
    tokenization.ROUTES,
    render.ROUTES,
    moderations.ROUTES,
    health.ROUTES,
    service.ROUTES,
    pages.ROUTES,
    pages.PLAYGROUND_ROUTES,
)


def build_app(
    settings: ServerSettings,
    *,
    fetcher: ImageFetcher | None = None,
    images: Images | None = None,
    engine_client: Engine | None = None,
    now: Clock | None = None,
) -> Sanic[Any, Any]:
    """The application that serves `settings`.

    fetcher, images, engine_client and now replace the real ones in tests; the caller closes
    them. Raises FileNotFoundError or ValueError if a file of the checkpoint or of the keys is
    unusable.
    """
    access = Access(settings)
    app = _sanic_app(settings)
    components = Components(settings, fetcher, images, engine_client, access.keys.weight_of)
    services = app.ctx.services = components.services(now, access.rate_limits)
    app.ctx.bytes_in_flight = _bytes_in_flight(settings)
    app.ctx.connection_places = ConnectionPlaces(
        settings.max_connections, NUM_RESERVED_PLACES, MAX_LINGERING
    )
    app.ctx.probe_places = ConnectionPlaces(NUM_PROBE_PLACES, 0, NUM_PROBE_PLACES)
    app.ctx.head_limits = HeadLimits(
        settings.max_head_bytes, settings.max_headers, takes_repeated_key=settings.repeated_key
    )
    app.ctx.access = access
    tracer = _tracer_of(settings)
    log = RequestLog(settings.log_requests, services.metrics, tracer)
    app.ctx.on_closed = functools.partial(_close_request, log)
    app.before_server_start(components.open)
    app.after_server_start(components.await_signal)
    app.after_server_stop(components.close)
    if tracer is not None:
        app.after_server_stop(lambda app: tracer.close())
    for group in _served(settings):
        group.add_to(app)
    app.ctx.document = functools.cache(lambda: _document(settings))
    memory = WorkerMemory(settings.max_memory_bytes, lambda: services.generator.num_open)
    _add_middleware(app, settings, access, memory)
    app.exception(Exception)(answer_error)
    return app


def _sanic_app(settings: ServerSettings) -> RecordedApp:
    """An application without routes, configured."""
    app = RecordedApp(
        f"vlmserve-{uuid.uuid4().hex[:8]}",
        env_prefix="",
        configure_logging=False,
        request_class=LenientRequest,
    )
    app.config.update(sanic_config(settings))
    return app


def _close_request(log: RequestLog, record: RequestRecord) -> None:
    release_current_reservation()
    log.add(record)


def _bytes_in_flight(settings: ServerSettings) -> BytesInFlight:
    """Raises ValueError if the bound leaves no room for a body of the largest size."""
    limit, body = settings.max_bytes_in_flight, settings.max_body_bytes
    if limit < 2 * body:
        raise ValueError(
            f"--max-bytes-in-flight is {limit:,}, and one API key gets at most half of it: set it"
            f" to twice --max-body-bytes ({body:,}) or more"
        )
    return BytesInFlight(limit)


def _tracer_of(settings: ServerSettings) -> Tracer | None:
    if settings.traces is None:
        return None
    from ..telemetry.tracing import Tracer  # needs an extra

    return Tracer(settings.traces)


def _response_store_of(settings: ServerSettings) -> ResponseStore | None:
    """Where responses are kept. Raises StoreError."""
    place = settings.responses_store
    if place == "off":
        return None
    file = IN_MEMORY if place == "memory" else place
    return ResponseStore(file, settings.responses_store_bytes, settings.responses_ttl_s)


class Components:
    """What lives as long as the server: engine connections, fetcher and decoders."""

    def __init__(
        self,
        settings: ServerSettings,
        fetcher: ImageFetcher | None,
        images: Images | None,
        engine: Engine | None,
        weight_of: Callable[[str], float],
    ) -> None:
        """weight_of: the weight of an API key, by its owner."""
        self._settings = settings
        self._links: list[EngineConnection] = []
        self._pool: ReplicaPool | None = None
        self._own_fetcher: ImageFetcher | None = None
        self._decoders: DecoderPool | None = None
        self._drain: Drain | None = None
        self._generator: Generator | None = None
        self._lag: asyncio.Task[None] | None = None
        num_replicas = 1 + len(settings.replica_sockets)
        vllm_model = settings.model_name if settings.metrics_names == "vllm" else None
        self._metrics = Metrics(
            settings.max_num_seqs * num_replicas, vllm_model, settings.max_loras
        )
        self._lanes = Lanes(settings.max_queue_wait_s, self._metrics.count_refusal, weight_of)
        self._grammar_checks = GrammarChecks(
            settings.model, lane=self._lanes.lane(GRAMMARS, NUM_CHILDREN)
        )
        self._threads = self._lanes.threads()
        self._engine = engine or self._make_engine()
        self._images = images or self._make_images(fetcher)
        self._responses = _response_store_of(settings)
        self._adapters = WorkerAdapters(
            settings.adapters, settings.served_model_names, self._engine, shared_folder(settings)
        )

    def services(self, now: Clock | None, rate_limits: RateLimits) -> Services:
        """The components as the routes use them."""
        settings = self._settings
        folder = Path(settings.model)
        processor = Processor.from_folder(
            folder,
            settings.image_position,
            now or datetime.datetime.now,
            template_file=Path(settings.chat_template) if settings.chat_template else None,
            content_format=settings.chat_template_content_format,
        )
        metrics = self._metrics
        processor.renderer.on_meta = metrics.count_meta_format
        if settings.task != "auto":
            processor.renderer.is_guard = settings.task == "moderation"
        self._generator = generator = Generator(
            processor,
            self._images,
            self._engine,
            metrics,
            settings.image_deadline_s,
            settings.max_request_time_s,
            grammar_checks=self._grammar_checks,
            max_answers=settings.max_answers_per_request,
            threads=self._threads,
            max_answer_logprobs=settings.max_answer_logprobs,
        )
        return Services(
            settings,
            self._engine,
            generator,
            metrics,
            processor,
            context_of(folder),
            rate_limits,
            self._adapters,
            self._responses,
            threads=self._threads,
        )

    async def open(self, app: Sanic[Any, Any]) -> None:
        """Start the decoders and start to connect to the engine, which may still be loading."""
        if self._decoders is not None:
            await self._decoders.open()
        self._lag = asyncio.create_task(watch_lag(self._metrics.event_loop_lag.observe))
        for link in self._links:
            link.open()
        self._adapters.open()

    async def await_signal(self, app: Sanic[Any, Any]) -> None:
        """Drain at SIGTERM. Sanic's own handler would refuse connections at once."""
        generator = self._generator
        if generator is None or threading.current_thread() is not threading.main_thread():
            return
        self._drain = Drain(
            self._settings.drain_time_s,
            lambda: generator.num_open,
            self._disconnect,
            lambda: app.stop(terminate=False),
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin_drain)

    def _begin_drain(self) -> None:
        assert self._drain is not None
        assert self._generator is not None
        self._generator.is_draining = True
        self._drain.start()

    async def close(self, app: Sanic[Any, Any]) -> None:
        """Close what `open` opened."""
        if self._lag is not None:
            await end_tasks(self._lag)
        await self._adapters.close()
        await self._disconnect()
        await self._grammar_checks.close()
        if self._own_fetcher is not None:
            await self._own_fetcher.close()
        if self._responses is not None:
            self._responses.close()

    async def _disconnect(self) -> None:
        """End every request that waits for the engine or the decoders."""
        if self._pool is not None:
            self._pool.stop()
        await asyncio.gather(*(link.stop() for link in self._links))
        await asyncio.gather(*(link.close() for link in self._links))
        if self._decoders is not None:
            await self._decoders.close()

    def _make_engine(self) -> Engine:
        """The client of one engine, or a pool of several."""
        settings = self._settings
        paths = [settings.engine_socket, *settings.replica_sockets]
        if len(paths) == 1:
            self._links = [EngineConnection(paths[0], "the engine")]
            return self._links[0].client
        self._links = [
            EngineConnection(
                path, f"the engine of replica {number}", functools.partial(self._lose, number)
            )
            for number, path in enumerate(paths)
        ]
        self._pool = ReplicaPool(
            [link.client for link in self._links],
            settings.health_thresholds,
            self._metrics.count_move,
            note_replica,
            # Workers that start together must not all choose the same replica first.
            first=os.getpid() % len(paths),
        )
        self._metrics.watch_replicas(self._pool.states)
        return self._pool

    def _lose(self, replica: int) -> None:
        assert self._pool is not None, "a replica is lost only after it was connected"
        self._pool.died(replica)

    def _make_images(self, fetcher: ImageFetcher | None) -> ImageLoader:
        limits = self._settings.images
        if fetcher is None:
            places = limits.max_concurrent_fetches
            fetches = self._lanes.lane(IMAGE_FETCHES, places)
            names = self._lanes.lane(NAME_LOOKUPS, MAX_LOOKUPS)
            fetcher = self._own_fetcher = ImageFetcher(limits, lane=fetches, names_lane=names)
        tiling = TilingConfig.from_checkpoint(self._settings.model)
        decoders = self._lanes.lane(IMAGE_DECODERS, limits.num_decoders)
        self._decoders = DecoderPool(limits, tiling, decoders)
        return ImageLoader(limits, fetcher, self._decoders, self._threads)


def _add_middleware(
    app: Sanic[Any, Any], settings: ServerSettings, access: Access, memory: WorkerMemory
) -> None:
    # Before routing, so that the head is judged before any byte of the body is kept.
    @app.signal("http.routing.before")
    async def admit(request: Request) -> None:
        access.check(request)
        owner: bytes = getattr(request.ctx, "key_owner", b"")
        set_current_reservation(app.ctx.bytes_in_flight.reserve(owner.hex()))
        if request.method == "POST":
            with memory.receiving(int(request.headers.get("content-length", 0))):
                await receive_body(request, settings.request_timeout_s)
        else:
            await receive_body(request, settings.request_timeout_s)
        await check_text(request)

    @app.on_response
    async def add_headers(request: Request, response: HTTPResponse) -> None:
        record = record_of(request)
        if record is not None:
            response.headers["X-Request-Id"] = record.request_id
            name_origin(record, response, settings.replica_name)
        name_ignored(request, response, services_of(request).metrics.count_ignored_field)
        access.mark(request, response)


def _served(settings: ServerSettings) -> list[Routes]:
    """The routes with these settings: without the playground's if it is off."""
    served = [group for group in ROUTES if settings.ui or group is not pages.PLAYGROUND_ROUTES]
    return [*served, *([adapters.ROUTES] if settings.adapters.allow_lora_updates else [])]


def _document(settings: ServerSettings) -> bytes:
    """The API's document, as JSON."""
    endpoints = [endpoint for group in _served(settings) for endpoint in group.endpoints]
    return orjson.dumps(document(endpoints, settings, __version__, keyless_paths(settings)))
