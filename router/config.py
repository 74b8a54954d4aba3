"""The engine's settings: types, defaults, bounds and command-line options.

The supervisor sends them to the engine process. The runner's settings, which these extend, are in
models/settings/runner_config.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..models.batch import AdapterRef, NonNegative, Positive
from ..models.settings.option import Limit, Option
from ..models.settings.runner_config import ADAPTERS, ENGINE, MODEL, RunnerConfig
from .processes.logs import LogFormat, LogLevel

LOG = "Log and traces"


class EngineConfig(RunnerConfig, frozen=True, kw_only=True):
    """Settings of one engine process.

    model: a local folder. replica: the number of this engine among num_replicas, each on its own
    devices or on its share of a CPU's cores and memory. parent_pid: the engine exits when this
    process exits; None: when the process that started it exits. adapters: read before the engine is
    ready. requires_adapters: the engine fails if it cannot use one of them; a restarted engine only
    logs it. image_folder: of --image-cache-host; empty without it.
    """

    model: str
    socket_path: str
    tensor_parallel_size: Annotated[
        Positive,
        Option(
            "Number of GPUs that share one model, each with a part of every layer. On a CPU: "
            "number of processes.",
            MODEL,
        ),
    ] = 1
    adapters: tuple[AdapterRef, ...] = ()
    requires_adapters: bool = True
    replica: NonNegative = 0
    num_replicas: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=64)],
        Option(
            "Number of engines. Each loads the whole model on its own GPUs, starting at --device. "
            "On a CPU they share cores and memory.",
            MODEL,
            name="replicas",
        ),
    ] = 1
    prefix_cache: Annotated[
        bool, Option("Cache computed text for prompts with the same beginning.", ENGINE)
    ] = True
    image_cache: Annotated[
        bool, Option("Cache encoded images for requests that send them again.", ENGINE)
    ] = True
    image_cache_host_bytes: Annotated[
        Positive | None,
        Option(
            "Memory in /dev/shm for encoded images, such as 16GiB, shared by all replicas. Evicted "
            "images are read from there, also after a restart of the engine. "
            "Not with --tensor-parallel-size. Default: off.",
            ENGINE,
            name="image-cache-host",
            metavar="BYTES",
        ),
    ] = None
    image_folder: str = ""
    plan_ahead: Annotated[
        bool | None,
        Option(
            "Prepare the next step while the current one runs, and start it before the current "
            "tokens reach the host. Answers do not change. Default: on CUDA only.",
            ENGINE,
        ),
    ] = None
    speculative: Annotated[
        Literal["none", "ngram"],
        Option(
            "ngram: draft the next tokens of a request from its own text or grammar, and verify "
            "them in one step. Answers do not change.",
            ENGINE,
        ),
    ] = "none"
    num_speculative_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=64)],
        Option(
            "With --speculative: maximum number of drafts of a request in a step. Fewer if "
            "measured step times, or the request's share of right drafts, make more a loss.",
            ENGINE,
        ),
    ] = 8
    lora_host_bytes: Annotated[
        Positive,
        Option(
            "Host memory for adapters, such as 8GiB. Above it, the unused adapter that was used "
            "longest ago is forgotten, and read again when a request names it.",
            ADAPTERS,
            name="lora-host-memory",
            metavar="BYTES",
        ),
    ] = 4_294_967_296
    poison_freed_blocks: Annotated[
        bool, Limit("Overwrite freed blocks, to find code that still reads them. Slow.")
    ] = False
    max_queue_requests: Annotated[
        Positive, Option("Maximum number of waiting requests; above it, 429.", ENGINE)
    ] = 256
    max_queue_tokens: Annotated[
        Positive, Option("Maximum prompt tokens of all waiting requests; above it, 429.", ENGINE)
    ] = 1_048_576
    max_queue_bytes: Annotated[
        Positive, Option("Maximum image bytes of all waiting requests; above it, 429.", ENGINE)
    ] = 1_073_741_824
    max_queue_wait_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0.001)] | None,
        Option(
            "Reject a request with 429 if its expected wait is longer than this many seconds. The "
            "estimate uses the duration of recent requests. Default: no limit.",
            ENGINE,
        ),
    ] = None
    max_frame_bytes: Annotated[Positive, Limit("Maximum bytes of one message from a worker.")] = (
        268_435_456
    )
    max_outgoing_bytes: Annotated[
        Positive, Limit("Disconnect a worker that leaves more than this many bytes unread.")
    ] = 16_777_216
    heartbeat_interval_s: Annotated[
        Annotated[float, msgspec.Meta(gt=0)], Limit("Seconds between the engine's heartbeats.")
    ] = 0.5
    log_level: Annotated[LogLevel, Option("Minimum log level of all processes.", LOG)] = "info"
    log_format: Annotated[
        LogFormat, Option("Write the log as text, or as one JSON object per line.", LOG)
    ] = "text"
    parent_pid: Positive | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, one line for the operator, if two settings contradict each other."""
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}, --max-num-seqs is "
                f"{self.max_num_seqs}: every running request needs one token per step; raise "
                "the first or lower the second"
            )
        if self.num_replicas > 1 and (self.device_map or self.max_memory):
            raise ValueError(
                "--replicas gives each engine its own devices; --device-map and --max-memory "
                "spread one engine over several: use one or the other"
            )

    @property
    def max_drafts(self) -> int:
        """How many drafts a request may have in a step; 0 without --speculative."""
        return 0 if self.speculative == "none" else self.num_speculative_tokens

    def plans_ahead(self, device: str) -> bool:
        """Whether an engine whose model is on `device` plans ahead."""
        return device.startswith("cuda") if self.plan_ahead is None else self.plan_ahead

    @property
    def process_name(self) -> str:
        """The engine's name in the log."""
        return "engine" if self.num_replicas == 1 else f"engine{self.replica}"
