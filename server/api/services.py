"""What the routes share: the services of one worker and the JSON they answer with.

Owns no endpoint. Knows nothing of any API's shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import orjson
from sanic import HTTPResponse, Request

from ...router.messages import NO_POLICY
from ..adapters.adapters import WorkerAdapters
from ..admission.fair_lane import FairLane
from ..admission.key_file import ApiKey, owner_of_digest
from ..admission.lanes import Lanes
from ..admission.rate_limits import RateLimits
from ..errors import ModelNotFoundError, RateLimitError
from ..generation.generator import Engine, Generator
from ..generation.preparer import PreparedGeneration
from ..generation.request import GenerationRequest
from ..prompts.processor import Processor
from ..schemas.decoding import decode_with_names
from ..schemas.json_text import INLINE_BYTES, check_now
from ..settings import ServerSettings
from ..telemetry.live import LiveFeed
from ..telemetry.metrics import Metrics
from .ignored_fields import report_ignored
from .response_store import ResponseStore

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(slots=True)
class Services:
    """One worker's parts, as `app.ctx.services`. threads: the lane of work that threads do."""

    settings: ServerSettings
    engine: Engine
    generator: Generator
    metrics: Metrics
    processor: Processor
    configured_model_len: int
    rate_limits: RateLimits
    adapters: WorkerAdapters
    responses: ResponseStore | None = None
    threads: FairLane = field(default_factory=lambda: Lanes().threads())
    started: int = field(default_factory=lambda: int(time.time()))
    live: LiveFeed = field(init=False)

    def __post_init__(self) -> None:
        self.live = LiveFeed(self.metrics, self.engine)

    @property
    def max_model_len(self) -> int:
        """The engine's context; before it is ready, the checkpoint's."""
        info = self.engine.info
        return self.configured_model_len if info is None else info.max_model_len

    @property
    def is_ready(self) -> bool:
        """The engine has its model, its heart beats, its steps get on, and nothing is stopping."""
        is_healthy = self.settings.health_thresholds.allow(self.engine)
        return is_healthy and not self.generator.is_draining


def context_of(folder: Path) -> int:
    """The checkpoint's context length in tokens, until the engine reports its own."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return int(config.get("text_config", config).get("max_position_embeddings", 0))


class _Context(Protocol):
    services: Services


def services_of(request: Request) -> Services:
    """The services of the worker that serves this request."""
    context: _Context = request.app.ctx
    return context.services


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> HTTPResponse:
    """A JSON answer, its keys in the order in which they were written."""
    return HTTPResponse(
        orjson.dumps(content), status=status, headers=headers, content_type="application/json"
    )


async def check_text(request: Request) -> None:
    """Check the text of a body; a large one in a thread, in its key's turn.

    This is plain Python, so the event loop goes on meanwhile.
    Raises BadRequestError, or OverloadedError if too many texts wait.
    """
    text = request.body
    if len(text) <= INLINE_BYTES:
        check_now(text)
        return
    lane = services_of(request).threads
    await lane.run_in_thread(owner_of(request), lambda: check_now(text))


async def read_body(request: Request, schema: type[T]) -> T:
    """The request's body as a `schema`; fields that were dropped are reported.

    Raises BadRequestError.
    """
    services = services_of(request)
    decode = functools.partial(
        decode_with_names, request.body, schema, services.settings.unknown_fields
    )
    if len(request.body) <= INLINE_BYTES:
        body = decode()
    else:
        # The request was admitted with the check of its text.
        lane = services.threads
        body = await lane.run_in_thread(owner_of(request), decode, is_bounded=False)
    # What was counted as the body's bytes are its strings from now on.
    request.body = b""
    del decode
    if body.unknown_fields:
        report_ignored(request, body.unknown_fields, services.metrics.count_ignored_field)
    return body.value


def tenant_of(request: Request, cache_salt: str | None = None) -> str:
    """The tenant: requests of one API key and cache_salt share cached images and texts.

    A hash, as the engine has no use for the key itself; empty without a key and a salt.
    """
    owner: bytes = getattr(request.ctx, "key_owner", b"")
    if not owner and not cache_salt:
        return ""
    # The key's digest has a fixed length, so that no key and salt pass for others.
    salt = (cache_salt or "").encode(errors="surrogatepass")
    return hashlib.sha256(owner.ljust(32, b"\0") + salt).hexdigest()


def owner_of(request: Request) -> str:
    """Which API key's share of the machine this request uses; empty without a key.

    Unlike the tenant it ignores cache_salt: a client cannot take a second share by a new salt.
    """
    owner: bytes = getattr(request.ctx, "key_owner", b"")
    return owner_of_digest(owner)


def as_client(
    request: Request, generation: GenerationRequest, cache_salt: str | None = None
) -> GenerationRequest:
    """The same generation, on behalf of the client: its tenant, its owner and the key's policy.

    It uses the adapter that the request has named.
    """
    key: ApiKey | None = getattr(request.ctx, "key", None)
    return dataclasses.replace(
        generation,
        tenant=tenant_of(request, cache_salt),
        owner=owner_of(request),
        policy=NO_POLICY if key is None else key.policy,
        adapter=getattr(request.ctx, "adapter", None),
    )


async def prepare(
    request: Request, generation: GenerationRequest, cache_salt: str | None = None
) -> PreparedGeneration:
    """As `Generator.prepare`, on behalf of the client and within the rates of its key.

    Raises RateLimitError too.
    """
    services = services_of(request)
    limits = services.rate_limits
    key: ApiKey | None = getattr(request.ctx, "key", None)
    if key is None:
        return await services.generator.prepare(as_client(request, generation, cache_salt))
    try:
        limits.take_request(key)
    except RateLimitError:
        services.metrics.fail_early()
        raise
    prepared = await services.generator.prepare(as_client(request, generation, cache_salt))
    limits.take_tokens(key, prepared.num_prompt_tokens)
    if key.tokens_per_minute is None:
        return prepared
    return dataclasses.replace(prepared, on_tokens=functools.partial(limits.take_tokens, key))


def check_model(request: Request, name: str) -> None:
    """Raises ModelNotFoundError unless a model or an adapter is served under this name.

    If it is an adapter's name, the request uses that adapter from now on.
    """
    services = services_of(request)
    served = services.settings.served_model_names
    if name in served:
        return
    adapter = services.adapters.registry.find(name)
    if adapter is None:
        raise ModelNotFoundError(
            f"The model {name[:200]!r} does not exist; this server has {', '.join(served)}.",
            param="model",
        )
    request.ctx.adapter = adapter.ref
