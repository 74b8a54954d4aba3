"""The settings of one HTTP worker, as the supervisor hands them over.

Owns names, defaults and ranges. Knows nothing of the engine's settings.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..models.batch import Positive
from ..router.client.engine_client import WellLimits
from ..router.logs import LogFormat, LogLevel
from .images.settings import ImageSettings

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where traces go; None leaves it to OpenTelemetry's own variables and defaults."""

    endpoint: str | None = None
    service_name: str | None = None


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a worker needs; it travels as JSON.

    model: a local folder with tokenizer and chat template. hub_id: the hub's repository that it
    was fetched from. served_model_names:
    the first is the name in answers, all are taken in requests. listen_fd: the
    inherited listening socket. first_output_wait_s: how long a stream waits for
    its first token before its headers go out, so that a refusal still has a status.
    max_request_time_s: from a request's arrival to the end of its answer; a request's
    own timeout_s may be shorter. api_key_file: read at the start and at each SIGHUP.
    allowed_hosts: names in Host that are answered, empty for all. cors_origins: whose
    pages may read answers, empty for none. log_requests: one line a request.
    traces: None sends none. ready_stall_s: how
    long a step may begin no layer of the model before the worker calls itself not ready.
    replica_sockets: of the engines beside that of `engine_socket`, where there are several.
    pulse_fd: the inherited pipe that tells the supervisor that the event loop runs.
    drain_time_s: from SIGTERM to the error that ends what is still open. reader_timeout_s: how
    long a client may read nothing of what waits for it; send_buffer_bytes: what the kernel
    may hold of it.
    """

    model: str
    engine_socket: str
    replica_sockets: list[str] = []
    served_model_names: list[str]
    listen_fd: int | None = None
    pulse_fd: int | None = None
    hub_id: str | None = None
    api_keys: list[str] = []
    api_key_file: str | None = None
    allowed_hosts: list[str] = []
    cors_origins: list[str] = []
    tls_certfile: str | None = None
    tls_keyfile: str | None = None
    image_position: Literal["front", "as-sent"] = "front"
    unknown_fields: Literal["error", "ignore"] = "error"
    max_connections: Positive = 1_000
    max_head_bytes: Positive = 16_384
    max_headers: Positive = 100
    max_body_bytes: Positive = 64 * 1024 * 1024
    max_num_seqs: Positive = 64
    request_timeout_s: Seconds = 10.0
    keep_alive_timeout_s: Seconds = 75.0
    stream_ping_interval_s: Seconds = 15.0
    first_output_wait_s: Seconds = 1.0
    heartbeat_timeout_s: Seconds = 2.0
    ready_stall_s: Seconds = 3.0
    drain_time_s: Seconds = 20.0
    reader_timeout_s: Seconds = 30.0
    send_buffer_bytes: Positive = 524_288
    image_deadline_s: Seconds = 30.0
    max_request_time_s: Seconds = 600.0
    images: ImageSettings = msgspec.field(default_factory=ImageSettings)
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    log_requests: bool = True
    traces: TraceSettings | None = None

    @property
    def needs_key(self) -> bool:
        """Whether clients must send a key: a file counts, whatever it holds."""
        return bool(self.api_keys) or self.api_key_file is not None

    @property
    def well_limits(self) -> WellLimits:
        """Until when an engine takes requests."""
        return WellLimits(self.heartbeat_timeout_s, self.ready_stall_s)

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.served_model_names[0]
