"""The options of the command line: names, types, ranges and help.

Owns one annotation an option, named after the command's parameter. Knows neither
defaults nor what becomes of a value.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from .byte_sizes import parse_bytes, parse_max_memory

MODEL_PANEL = "Model"
ENGINE_PANEL = "Engine"
HTTP_PANEL = "HTTP"
FAULTS_PANEL = "Faults and restarts"
ACCESS_PANEL = "Access"
LOG_PANEL = "Log and traces"


class Dtype(StrEnum):
    """Compute types; auto is bfloat16 where the device has its instructions."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(StrEnum):
    """How the decoder's weights are held; the vision encoder stays in the compute type."""

    int8 = "int8"
    bitsandbytes = "bitsandbytes"
    bitsandbytes_nf4 = "bitsandbytes-nf4"


class Attention(StrEnum):
    """What computes attention; auto is the fastest that works on the device."""

    auto = "auto"
    sdpa = "sdpa"
    flash_attn = "flash_attn"
    triton = "triton"
    varlen = "varlen"


class ImagePosition(StrEnum):
    """Where a user message's images stand in its prompt."""

    front = "front"
    as_sent = "as-sent"


class LogLevel(StrEnum):
    """The least that the log tells; debug also tells what errors of requests say."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(StrEnum):
    """How a line of the log is written."""

    text = "text"
    json = "json"


class UnknownFields(StrEnum):
    """What a request field that the API does not have leads to."""

    error = "error"
    ignore = "ignore"


def _bytes(text: str) -> int:
    """`parse_bytes` with the command line's own error."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _max_memory(text: str) -> dict[str, int]:
    """`parse_max_memory` with the command line's own error."""
    try:
        return parse_max_memory(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="A model folder or hub id; nothing serves the small bundled model.",
        envvar="VLMSERVE_MODEL",
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MODEL_PANEL)
]
CacheDir = Annotated[
    str | None,
    typer.Option(
        help="Folder for what is downloaded from the hub; default: the hub's own, in HF_HOME.",
        rich_help_panel=MODEL_PANEL,
    ),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        help="Names in the API, several with commas or by repeating; the first stands in answers. "
        "Default: the hub id or the folder's name.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Compute type; auto is bfloat16 where the device has it, else float32.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N; auto is CUDA where there is one.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="auto|balanced|FILE",
        help="Spread the model: auto takes one GPU where it fits, balanced all alike, a JSON file "
        "says where each module lies (a GPU's number, cpu or disk). Several GPUs: unverified.",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxMemory = Annotated[
    dict[str, int] | None,
    typer.Option(
        parser=_max_memory,
        metavar="DEVICE=BYTES,...",
        help="Most memory that a spread model takes of each device, such as "
        "0=20GiB,cpu=40GiB; others are not used, and what is left over lies on disk.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Quantize = Annotated[
    Quantization | None,
    typer.Option(
        help="Hold the decoder's weights in 8 bits (int8, or bitsandbytes for LLM.int8) or in 4 "
        "(bitsandbytes-nf4).",
        rich_help_panel=MODEL_PANEL,
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="GPUs that share one model, each with a part of every layer; on a CPU, processes.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Replicas = Annotated[
    int,
    typer.Option(
        min=1,
        max=64,
        help="Engines, each with the whole model on GPUs of its own, from --device on; on a CPU "
        "they share cores and memory.",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest prompt plus answer, in tokens; default: the model's own.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
MaxNumSeqs = Annotated[
    int, typer.Option(min=1, help="Requests that run at once.", rich_help_panel=ENGINE_PANEL)
]
MaxNumBatchedTokens = Annotated[
    int,
    typer.Option(
        min=1,
        help="Most tokens in one step; while answers stream, images count as what they cost.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
MaxNumBatchedImages = Annotated[
    int, typer.Option(min=1, help="Most images encoded in one step.", rich_help_panel=ENGINE_PANEL)
]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        help="What computes attention: sdpa runs anywhere, flash_attn, triton and varlen on CUDA; "
        "auto takes the fastest that works and tells the log why.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of a block of text; default: 16, or the 256 that flash_attn and varlen need.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
KvCacheMemory = Annotated[
    int | None,
    typer.Option(
        parser=_bytes,
        metavar="BYTES",
        help="Memory for keys and values of text and images, such as 8GiB; on a CPU too; "
        "of each replica. Default: what weights and the largest step leave.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(
        min=0.01,
        max=1.0,
        help="Share of a GPU's memory that the server may take, whatever others hold included.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
NumImageBlocks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Image tiles that fit the cache at once.", rich_help_panel=ENGINE_PANEL
    ),
]
MaxConnections = Annotated[
    int,
    typer.Option(
        min=1,
        help="Connections to one worker; beyond that an idle one is closed, or the new one gets a "
        "503.",
        rich_help_panel=HTTP_PANEL,
    ),
]
MaxHeadBytes = Annotated[
    int,
    typer.Option(
        min=256,
        max=65_536,
        help="Bytes of a request's head; beyond that 431.",
        rich_help_panel=HTTP_PANEL,
    ),
]
MaxHeaders = Annotated[
    int,
    typer.Option(min=1, help="Headers of a request; beyond that 431.", rich_help_panel=HTTP_PANEL),
]
MaxBodyBytes = Annotated[
    int,
    typer.Option(
        min=1_024, help="Bytes of a request's body; beyond that 413.", rich_help_panel=HTTP_PANEL
    ),
]
RequestTimeout = Annotated[
    float,
    typer.Option(
        min=0.1,
        help="Seconds that a request's head, and a small body, may take to come; beyond that 408.",
        rich_help_panel=HTTP_PANEL,
    ),
]
MaxRequestTime = Annotated[
    float,
    typer.Option(
        min=0.001,
        help="Longest time of a request in seconds, from its arrival to the end of its answer.",
        rich_help_panel=HTTP_PANEL,
    ),
]
Workers = Annotated[
    int,
    typer.Option(min=1, help="HTTP worker processes on the one port.", rich_help_panel=HTTP_PANEL),
]
DrainTime = Annotated[
    float,
    typer.Option(
        min=0,
        help="Seconds that open requests have after SIGTERM before they end by an error.",
        rich_help_panel=FAULTS_PANEL,
    ),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0,
        help="Restarts of one process in five minutes; when it ends once more, the server ends "
        "with exit code 1.",
        rich_help_panel=FAULTS_PANEL,
    ),
]
MaxStepStall = Annotated[
    float,
    typer.Option(
        min=0.1,
        help="Seconds that a step of the model may begin no layer before the engine counts as hung "
        "and is restarted. The first step of a kind has 600, as it may compile kernels.",
        rich_help_panel=FAULTS_PANEL,
    ),
]
MaxWorkerStall = Annotated[
    float,
    typer.Option(
        min=1.0,
        help="Seconds that an HTTP worker's event loop may stand still before the worker counts as "
        "hung and is restarted.",
        rich_help_panel=FAULTS_PANEL,
    ),
]
SpareEngine = Annotated[
    bool,
    typer.Option(
        help="Keep a process (some 300 MB) that has imported what an engine needs, so that a "
        "restart only loads the model.",
        rich_help_panel=FAULTS_PANEL,
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        help="Record decode steps and replay them, on a GPU with attention by triton (unverified).",
        rich_help_panel=ENGINE_PANEL,
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        help="Keep computed text for prompts that begin alike.", rich_help_panel=ENGINE_PANEL
    ),
]
ImageCache = Annotated[
    bool,
    typer.Option(
        help="Keep encoded pictures for whoever sends them again.", rich_help_panel=ENGINE_PANEL
    ),
]
PlanAhead = Annotated[
    bool | None,
    typer.Option(
        help="Prepare the next step while one is computed; default: on CUDA. Answers are the same.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
NumThreads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="CPU threads of the model; default: the cores that are left, or OMP_NUM_THREADS.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
MaxQueueRequests = Annotated[
    int,
    typer.Option(
        min=1, help="Requests that may wait; beyond that 429.", rich_help_panel=ENGINE_PANEL
    ),
]
MaxQueueTokens = Annotated[
    int, typer.Option(min=1, help="Prompt tokens that may wait.", rich_help_panel=ENGINE_PANEL)
]
MaxQueueBytes = Annotated[
    int, typer.Option(min=1, help="Bytes of images that may wait.", rich_help_panel=ENGINE_PANEL)
]
MaxQueueWait = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Seconds that a request may be expected to wait, by how long the last ones ran; "
        "beyond that 429. Default: any.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=HTTP_PANEL)]
Port = Annotated[
    int,
    typer.Option(min=0, max=65535, help="Port; 0 picks a free one.", rich_help_panel=HTTP_PANEL),
]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        help="Key that clients must send; may be given several times. "
        "The environment variable keeps it out of the process list.",
        envvar="VLMSERVE_API_KEY",
        rich_help_panel=ACCESS_PANEL,
    ),
]
ApiKeyFile = Annotated[
    str | None,
    typer.Option(
        help="File of further keys, one a line; lines that begin with # are comments. Read again "
        "at SIGHUP.",
        rich_help_panel=ACCESS_PANEL,
    ),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        help="Host that requests may name, such as api.example.com or *.example.com; may be given "
        "several times. Default: any.",
        rich_help_panel=ACCESS_PANEL,
    ),
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        help="Origin whose pages may read answers, such as https://chat.example.com, or '*'; may "
        "be given several times. Default: none.",
        rich_help_panel=ACCESS_PANEL,
    ),
]
TlsCertfile = Annotated[
    str | None,
    typer.Option(
        help="Certificate chain in PEM: serve https. Read again at SIGHUP.",
        rich_help_panel=ACCESS_PANEL,
    ),
]
TlsKeyfile = Annotated[
    str | None,
    typer.Option(
        help="Its key in PEM, without a password; default: in the certificate's file.",
        rich_help_panel=ACCESS_PANEL,
    ),
]
LogLevelOption = Annotated[
    LogLevel,
    typer.Option(help="The least that all processes log.", rich_help_panel=LOG_PANEL),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option(help="One JSON object a line, or text.", rich_help_panel=LOG_PANEL),
]
LogRequests = Annotated[
    bool, typer.Option(help="Log one line a request.", rich_help_panel=LOG_PANEL)
]
Otel = Annotated[
    bool | None,
    typer.Option(
        help="Send OpenTelemetry traces (extra vlmserve[otel]); default: where an endpoint is set.",
        rich_help_panel=LOG_PANEL,
    ),
]
OtelServiceName = Annotated[
    str | None,
    typer.Option(
        help="Name of the service in traces; default: OTEL_SERVICE_NAME, or vlmserve.",
        rich_help_panel=LOG_PANEL,
    ),
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        help="Where traces go by OTLP over HTTP, such as http://collector:4318; default: "
        "OTEL_EXPORTER_OTLP_ENDPOINT, or http://localhost:4318 with --otel.",
        rich_help_panel=LOG_PANEL,
    ),
]
ImagePositionOption = Annotated[
    ImagePosition,
    typer.Option(
        help="front moves a message's images before its text, where the text can see them.",
        rich_help_panel=HTTP_PANEL,
    ),
]
MaxImages = Annotated[
    int, typer.Option(min=1, help="Images in one request.", rich_help_panel=HTTP_PANEL)
]
AllowPrivateImageUrls = Annotated[
    bool,
    typer.Option(
        "--allow-private-image-urls",
        help="Fetch images from private and loopback addresses too: only where every client "
        "is trusted.",
        rich_help_panel=HTTP_PANEL,
    ),
]
UnknownFieldsOption = Annotated[
    UnknownFields,
    typer.Option(
        help="Answer unknown request fields with 400, or ignore and log them.",
        rich_help_panel=HTTP_PANEL,
    ),
]
