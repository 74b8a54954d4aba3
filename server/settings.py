"""The settings of one HTTP worker: types, defaults, bounds and command-line options."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..models.batch import NonNegative, Positive
from ..models.settings.option import Limit, Option
from ..models.settings.runner_config import MODEL
from ..router.client.engine_client import HealthThresholds
from ..router.config import LOG
from ..router.processes.logs import LogFormat, LogLevel
from .adapters.settings import AdapterSettings
from .images.settings import HTTP, ImageSettings

ACCESS = "Access"

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where to send traces. None: use OpenTelemetry's own variables and defaults."""

    endpoint: str | None = None
    service_name: str | None = None


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a worker needs. The supervisor sends it as JSON.

    model: a local folder with tokenizer and chat template. hub_id: the hub repository of the
    model, if it came from the hub. served_model_names: requests may use any of them; answers use
    the first. listen_fd: the inherited listening socket. probe_fd: that of --metrics-port.
    liveness_fd: the inherited pipe to which the event loop writes, so that the supervisor can
    detect a hung worker. replica_sockets: the engines besides `engine_socket`. traces: None
    disables tracing.
    """

    model: str
    engine_socket: str
    replica_sockets: list[str] = []
    served_model_names: Annotated[
        list[str],
        Option(
            "Model names in the API, separated by commas; repeatable. Answers use the first. "
            "Default: the hub id or the folder name.",
            MODEL,
            name="served-model-name",
        ),
    ]
    listen_fd: int | None = None
    probe_fd: int | None = None
    liveness_fd: int | None = None
    hub_id: str | None = None
    api_keys: Annotated[
        list[str],
        Option(
            "API key that clients must send; repeatable. Set the environment variable instead to "
            "keep the key out of the process list.",
            ACCESS,
            name="api-key",
        ),
    ] = []
    api_key_file: Annotated[
        str | None,
        Option(
            "File of more API keys, one per line, each with its weight and limits; see "
            "docs/how-to/limits-by-key.md. Reread on SIGHUP.",
            ACCESS,
        ),
    ] = None
    allowed_hosts: Annotated[
        list[str],
        Option(
            "Host name that requests may use, such as api.example.com or *.example.com; "
            "repeatable. Default: any.",
            ACCESS,
            name="allowed-host",
        ),
    ] = []
    cors_origins: Annotated[
        list[str],
        Option(
            "Origin whose web pages may read answers, such as https://chat.example.com, or '*'; "
            "repeatable. Default: none.",
            ACCESS,
            name="cors-origin",
        ),
    ] = []
    ui: Annotated[bool, Option("Serve the playground, a page for the browser, at /.", HTTP)] = True
    tls_certfile: Annotated[
        str | None,
        Option("PEM file with the certificate chain; enables https. Reread on SIGHUP.", ACCESS),
    ] = None
    tls_keyfile: Annotated[
        str | None,
        Option(
            "PEM file with the certificate's private key, without a password. Default: the key is "
            "in --tls-certfile.",
            ACCESS,
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        Option(
            "Jinja file with the chat template. Default: the checkpoint's.",
            MODEL,
            metavar="FILE",
        ),
    ] = None
    chat_template_content_format: Annotated[
        Literal["auto", "string", "openai"],
        Option(
            "How the chat template gets the content of each message. string: as one text. openai: "
            "as a list of parts. auto: as the template reads it.",
            MODEL,
        ),
    ] = "auto"
    task: Annotated[
        Literal["auto", "generate", "moderation"],
        Option(
            "What the model is for. moderation: a guard, which answers /v1/moderations. auto: a "
            "guard if its chat template has a guard's policy.",
            MODEL,
        ),
    ] = "auto"
    image_position: Annotated[
        Literal["auto", "front", "as-sent"],
        Option(
            "Where the images of a message are put, because the model only sees earlier images. "
            "auto: before the text if all follow it, else as sent. front: always before the text. "
            "as-sent: as sent.",
            HTTP,
        ),
    ] = "auto"
    unknown_fields: Annotated[
        Literal["report", "refuse", "ignore", "error"],
        Option(
            "Unknown request fields. report: drop them, name them in X-Ignored-Fields, answer 400 "
            "to misspelt ones. refuse: answer 400. ignore: drop them. error: older name of refuse.",
            HTTP,
        ),
    ] = "report"
    replica_name: Annotated[
        Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None,
        Option(
            "Name of this server in the header X-Replica of answers, for gateways in front of "
            "several servers. With --replicas, the engine's number follows it. Default: none.",
            HTTP,
        ),
    ] = None
    open_metrics: Annotated[
        bool,
        Option(
            "Serve /metrics without an API key on the API's port too, to any host, for endpoint "
            "pickers that scrape the port they send to. Default: only on --metrics-port.",
            ACCESS,
        ),
    ] = False
    repeated_key: Annotated[
        bool,
        Option(
            "Accept the same Authorization header twice, which sglang-router sends: its own key "
            "beside the client's equal one. Default: answer 400.",
            ACCESS,
        ),
    ] = False
    metrics_names: Annotated[
        Literal["own", "vllm"],
        Option(
            "Names of the metrics. vllm: report them under vLLM's names too, for routers, "
            "autoscalers and dashboards that read those.",
            LOG,
        ),
    ] = "own"
    responses_store: Annotated[
        str,
        Option(
            "Where /v1/responses keeps responses for previous_response_id: memory, off, or the "
            "path of a SQLite file. Several workers need a file.",
            HTTP,
            metavar="memory|off|FILE",
        ),
    ] = "memory"
    responses_store_bytes: Annotated[
        Positive,
        Limit("Maximum bytes of kept responses. Above it, the API key with most loses its oldest."),
    ] = 268_435_456
    responses_ttl_s: Annotated[Seconds, Limit("Seconds until a kept response is deleted.")] = (
        86_400.0
    )
    max_connections: Annotated[
        Positive,
        Option(
            "Maximum connections per worker. When all are taken, the connection whose request is "
            "overdue longest is closed; if there is none, new requests other than health checks "
            "get 503.",
            HTTP,
        ),
    ] = 1_000
    max_head_bytes: Annotated[
        Annotated[int, msgspec.Meta(ge=256, le=65_536)],
        Option("Maximum bytes of a request's head; above it, 431.", HTTP),
    ] = 16_384
    max_headers: Annotated[
        Positive, Option("Maximum number of request headers; above it, 431.", HTTP)
    ] = 100
    max_body_bytes: Annotated[
        Annotated[int, msgspec.Meta(ge=1_024)],
        Option("Maximum bytes of a request's body; above it, 413.", HTTP),
    ] = 67_108_864
    max_bytes_in_flight: Annotated[
        Positive,
        Option(
            "Maximum bytes of bodies and images that the open requests of a worker keep; above "
            "it, 429. One API key gets at most half.",
            HTTP,
        ),
    ] = 2_147_483_648
    max_memory_bytes: Annotated[
        Positive | None,
        Option(
            "Memory of a worker above which new requests get a 503, such as 2GiB. Default: 15 % of "
            "the memory that is available at the start, divided by --workers; at least 1 GiB.",
            HTTP,
            name="max-memory-worker",
            metavar="BYTES",
        ),
    ] = None
    max_num_seqs: Positive = 64
    max_loras: NonNegative = 0
    max_answers_per_request: Annotated[
        Positive | None,
        Option(
            "Maximum answers of one request: n, times the prompts of a completion; above it, 400. "
            "Default: a quarter of --max-num-seqs, at least 1.",
            HTTP,
        ),
    ] = None
    max_queue_wait_s: Annotated[float, msgspec.Meta(ge=0.001)] | None = None
    max_answer_logprobs: Annotated[
        Positive,
        Option(
            "Maximum log-probabilities in an answer that is not streamed: tokens times answers "
            "times (1 + top_logprobs); above it, 400.",
            HTTP,
        ),
    ] = 262_144
    request_timeout_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0.1)],
        Option(
            "Maximum seconds to receive a request's head, or a small body; after that, 408.", HTTP
        ),
    ] = 10.0
    max_request_time_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0.001)],
        Option(
            "Maximum seconds from a request's arrival to the end of its answer. timeout_s of a "
            "request may be shorter.",
            HTTP,
        ),
    ] = 600.0
    keep_alive_timeout_s: Annotated[
        Seconds, Limit("Seconds until the server closes an idle connection.")
    ] = 75.0
    stream_ping_interval_s: Annotated[
        Seconds, Limit("Seconds between the comments that keep a silent stream open.")
    ] = 15.0
    first_output_wait_s: Annotated[
        Seconds,
        Limit(
            "Seconds a stream waits for its first token before it sends the headers. A request "
            "rejected within that time still gets an error status."
        ),
    ] = 1.0
    heartbeat_timeout_s: Annotated[
        Seconds, Limit("Seconds without a heartbeat of the engine until ready answers 503.")
    ] = 2.0
    ready_stall_s: Annotated[
        Seconds, Limit("Seconds without progress of a step until ready answers 503.")
    ] = 3.0
    drain_time_s: Seconds = 20.0
    reader_timeout_s: Annotated[
        Seconds,
        Limit("Seconds until the server disconnects a client that does not read its answer."),
    ] = 30.0
    send_buffer_bytes: Annotated[
        Positive, Limit("Bytes of an answer that the kernel buffers for a slow client.")
    ] = 524_288
    image_deadline_s: Annotated[
        Seconds, Limit("Maximum seconds to load all images of a request; after that, 504.")
    ] = 30.0
    images: ImageSettings = msgspec.field(default_factory=ImageSettings)
    adapters: AdapterSettings = msgspec.field(default_factory=AdapterSettings)
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    log_requests: Annotated[bool, Option("Log one line per request.", LOG)] = True
    traces: TraceSettings | None = None

    @property
    def needs_key(self) -> bool:
        """Whether clients must send a key; true for a key file, even an empty one."""
        return bool(self.api_keys) or self.api_key_file is not None

    @property
    def health_thresholds(self) -> HealthThresholds:
        """When an engine counts as unhealthy."""
        return HealthThresholds(self.heartbeat_timeout_s, self.ready_stall_s)

    @property
    def model_name(self) -> str:
        """The model name in answers."""
        return self.served_model_names[0]
