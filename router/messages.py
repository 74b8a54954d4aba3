"""Messages between HTTP workers and the engine, msgpack over a Unix socket.

Owns the types of the messages; `wire.py` has the frames. Knows nothing of tensors, text or HTTP.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..models.batch import (
    AdapterInfo,
    AdapterRef,
    ImageRef,
    ImageSpan,
    NonNegative,
    Positive,
    PromptLogprobs,
    SamplingParams,
    TokenLogprobs,
)

# Upper bounds in seconds by which steps of the vision encoder are counted.
VISION_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

FinishReason = Literal["stop", "length", "abort"]
FailureKind = Literal["queue_full", "too_many", "invalid", "adapter", "internal", "engine_dead"]


class OwnerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What an API key may do, sent with each of its requests.

    weight: its part of the machine while others wait, relative to theirs. cross_priority: its
    priorities count against other owners' requests too. max_concurrent: most answers that run or
    wait in one engine at once; None: no limit.
    """

    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    cross_priority: bool = False
    max_concurrent: Positive | None = None


NO_POLICY = OwnerPolicy()


class AddRequest(msgspec.Struct, tag="add", kw_only=True):
    """A worker requests tokens.

    request_id: made by the server, never taken from a client. choice_ids: the ids of further
    answers to the same prompt, each with its own outputs and end; the prompt and its images are
    computed once for all. owner: a hash of the API key, empty for all clients without a key; owners
    share the machine by their policies. tenant: requests of one tenant share cached blocks.
    priority: of an owner's waiting requests, the one with the lower number runs first.
    images[i] belongs to spans[i], in prompt order. They are sent without tiles: the engine asks for
    those that it lacks (`NeedImage`), and the worker keeps them as long as the request is open.
    grammar: in llguidance's JSON, the texts that the answer may have.
    eos_token_ids: these tokens end the turn, and stop_token_id is None.
    stop_token_ids: these tokens end the answer and are reported as stop_token_id.
    num_prompt_logprobs: how many of the likeliest tokens come with each token of the prompt, in
    the first choice's first output; None: no log-probabilities of the prompt. adapter: None: the
    base model. An engine that does not have it reads it from its folder.
    """

    request_id: str
    prompt_token_ids: list[int]
    images: list[ImageRef] = []
    spans: list[ImageSpan] = []
    sampling: SamplingParams = SamplingParams()
    max_tokens: Positive
    eos_token_ids: list[int] = []
    stop_token_ids: list[int] = []
    tenant: str = ""
    owner: str = ""
    policy: OwnerPolicy = NO_POLICY
    choice_ids: list[str] = []
    priority: int = 0
    grammar: str | None = None
    num_prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    adapter: AdapterRef | None = None

    @property
    def answer_ids(self) -> list[str]:
        """The ids of all answers to this prompt, the first one's in front."""
        return [self.request_id, *self.choice_ids]


class AbortRequests(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class ImagePiece(msgspec.Struct, tag="image", kw_only=True):
    """The next bytes of an image's tiles, for a `NeedImage`; data begins at byte `offset`."""

    question: NonNegative
    offset: NonNegative
    data: bytes


class LoadAdapter(msgspec.Struct, tag="load_adapter", kw_only=True):
    """A worker asks whether the engine can use an adapter; the engine reads it."""

    call_id: str
    adapter: AdapterRef


class UnloadAdapter(msgspec.Struct, tag="unload_adapter", kw_only=True):
    """Forget an adapter, by its digest, when no open request uses it."""

    call_id: str
    digest: str


class AdapterReady(msgspec.Struct, tag="adapter_ready", kw_only=True):
    """The end of `LoadAdapter`: the engine can use it."""

    call_id: str
    info: AdapterInfo


class AdapterFailed(msgspec.Struct, tag="adapter_failed", kw_only=True):
    """The end of `LoadAdapter`: the engine cannot use it. message: names the file or tensor."""

    call_id: str
    message: str


class AdapterUnloaded(msgspec.Struct, tag="adapter_unloaded", kw_only=True):
    """The end of `UnloadAdapter`."""

    call_id: str


class EngineStats(msgspec.Struct, kw_only=True):
    """Counts at one moment. Block counts are numbers of blocks, not bytes.

    num_running, num_waiting: numbers of answers; a request for n answers counts n times. Used
    blocks belong to running requests; cached blocks can be found again. image_cache_hits and
    _misses: each image of a request counts once; a miss had no blocks yet. prefix_tokens_queried:
    tokens of requests that started; prefix_tokens_hit: how many of them came from the cache.
    vision_step_counts: how many steps spent up to each of VISION_BOUNDS_S seconds in the vision
    encoder; the last count is above all bounds. block_size: tokens of a text block.
    running_adapters, waiting_adapters: numbers of answers by the name of their adapter.
    num_drafts: how often a request had drafts in a step; num_draft_tokens: how many;
    num_accepted_tokens: how many of them became tokens of answers.
    image_host_...: images in host memory that were read, looked up in vain, damaged, evicted, and
    not kept because writing was behind; and the bytes of all.
    """

    num_running: NonNegative = 0
    num_waiting: NonNegative = 0
    num_steps: NonNegative = 0
    text_blocks_used: NonNegative = 0
    text_blocks_total: NonNegative = 0
    text_blocks_cached: NonNegative = 0
    image_blocks_used: NonNegative = 0
    image_blocks_cached: NonNegative = 0
    image_blocks_total: NonNegative = 0
    num_preemptions: NonNegative = 0
    num_images_encoded: NonNegative = 0
    vision_seconds: float = 0.0
    image_cache_hits: NonNegative = 0
    image_cache_misses: NonNegative = 0
    image_cache_evictions: NonNegative = 0
    image_host_hits: NonNegative = 0
    image_host_misses: NonNegative = 0
    image_host_bytes: NonNegative = 0
    image_host_damaged: NonNegative = 0
    image_host_evictions: NonNegative = 0
    image_host_dropped: NonNegative = 0
    vision_step_counts: list[NonNegative] = []
    prefix_tokens_queried: NonNegative = 0
    prefix_tokens_hit: NonNegative = 0
    num_drafts: NonNegative = 0
    num_draft_tokens: NonNegative = 0
    num_accepted_tokens: NonNegative = 0
    block_size: NonNegative = 0
    running_adapters: dict[str, NonNegative] = {}
    waiting_adapters: dict[str, NonNegative] = {}


class EngineReady(msgspec.Struct, tag="ready", kw_only=True):
    """Sent to every worker when it connects and the model is loaded.

    max_memory_bytes: what the engine's process takes of the machine's memory at most; 0 if unknown.
    """

    pid: int
    max_model_len: Positive
    vocab_size: Positive
    max_num_seqs: Positive
    device: str
    dtype: str
    num_text_tokens: NonNegative
    num_image_tiles: NonNegative
    max_memory_bytes: NonNegative = 0


class SequenceOutput(msgspec.Struct, kw_only=True):
    """New tokens of one answer.

    token_ids: include the stopping token. finish_reason: set in the last output only.
    stop_token_id: set if one of the request's stop_token_ids matched. logprobs: one entry per
    token if requested, else empty.
    In the first output only: num_cached_tokens, how many of the prompt's tokens were cached;
    queue_s, the seconds until the answer first ran; vision_s, the seconds that the vision encoder
    spent on its images, 0 for cached ones and for choices after the first; prompt_logprobs, if
    requested: one entry per token of the prompt, None for the first token and for `<|image|>`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] = []
    num_cached_tokens: NonNegative = 0
    queue_s: float = 0.0
    vision_s: float = 0.0
    prompt_logprobs: list[PromptLogprobs | None] | None = None


class Rejection(msgspec.Struct, kw_only=True):
    """The error that a new request of this owner and priority 0 would get."""

    owner: str
    message: str
    retry_after_s: float


class StepOutputs(msgspec.Struct, tag="step", kw_only=True):
    """One step's outputs for one worker. rejections: the owners whose line is full after it."""

    outputs: list[SequenceOutput]
    rejections: list[Rejection] = []


class RequestsStarted(msgspec.Struct, tag="started"):
    """With several engines: sent before the step that computes these requests first.

    If the engine dies, they are not retried on another engine, because they may be the cause.
    """

    request_ids: list[str]


class NeedImage(msgspec.Struct, tag="need_image", kw_only=True):
    """Send the tiles of an image of this request, by its content, in pieces in their order.

    question: an engine's own number, which the pieces repeat. A worker sends nothing for a request
    that has ended: its `AbortRequests` is on the way.
    """

    question: NonNegative
    request_id: str
    content_hash: bytes


class RequestFailed(msgspec.Struct, tag="failed", kw_only=True):
    """A request's final message if it failed."""

    request_id: str
    kind: FailureKind
    message: str
    retry_after_s: float | None = None


class Heartbeat(msgspec.Struct, tag="heartbeat", kw_only=True):
    """Sent every heartbeat_interval_s.

    step_age_s: the age of the running step, 0 when idle. stall_s: how long that step has made no
    progress. may_compile: it is the first step of its kind, so it may be compiling kernels, which
    is not counted as progress.
    """

    stats: EngineStats
    step_age_s: float = 0.0
    stall_s: float = 0.0
    may_compile: bool = False


AdapterAnswer = AdapterReady | AdapterFailed | AdapterUnloaded
ToEngine = AddRequest | AbortRequests | ImagePiece | LoadAdapter | UnloadAdapter
FromEngine = (
    EngineReady
    | StepOutputs
    | RequestsStarted
    | NeedImage
    | RequestFailed
    | Heartbeat
    | AdapterAnswer
)
