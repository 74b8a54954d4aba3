"""Messages between HTTP workers and the engine, msgpack over a Unix socket.

Owns the wire's types. Knows nothing of tensors, text or HTTP. A frame is a
4-byte big-endian length and one message; see `wire.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..models.batch import (
    ImageSpan,
    ImageTiles,
    NonNegative,
    Positive,
    PromptLogprobs,
    SamplingParams,
    TokenLogprobs,
)

# Upper bounds in seconds by which steps of the vision encoder are counted.
VISION_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

FinishReason = Literal["stop", "length", "abort"]
FailureKind = Literal["queue_full", "invalid", "internal", "engine_dead"]


class AddRequest(msgspec.Struct, tag="add", kw_only=True):
    """A worker asks for tokens.

    request_id is made by the server, never taken from a client. choice_ids: the ids
    of further answers to the same prompt, each with outputs and an end of its own;
    the prompt and its images are computed once for all. Of two requests that wait
    the one of lower priority runs first. images and
    spans run in parallel, in prompt order. grammar, in llguidance's JSON: the texts
    that the answer may be. A token in `eos_token_ids` ends the
    turn (stop_token_id None in the answer), one in `stop_token_ids` is reported.
    num_prompt_logprobs: how many of the likeliest tokens are told beside each token of
    the prompt, with the first choice's first output; None tells of none.
    """

    request_id: str
    prompt_token_ids: list[int]
    images: list[ImageTiles] = []
    spans: list[ImageSpan] = []
    sampling: SamplingParams = SamplingParams()
    max_tokens: Positive
    eos_token_ids: list[int] = []
    stop_token_ids: list[int] = []
    tenant: str = ""
    choice_ids: list[str] = []
    priority: int = 0
    grammar: str | None = None
    num_prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None

    @property
    def answer_ids(self) -> list[str]:
        """The ids of all answers to this prompt, the first one's in front."""
        return [self.request_id, *self.choice_ids]


class AbortRequests(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class EngineStats(msgspec.Struct, kw_only=True):
    """Counts at one moment; all block counts are of blocks, not bytes.

    num_running and num_waiting are of answers: a request for n of them counts n times.
    Used blocks are those that running requests need; cached ones are kept in case
    they are needed again. An image counts once a request and picture: a miss is one
    that had no blocks yet. prefix_tokens_queried: tokens of requests that started,
    prefix_tokens_hit: those of them that were not computed again. vision_step_counts: how
    many steps spent up to each of VISION_BOUNDS_S in the vision encoder, and beyond the last.
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
    vision_step_counts: list[NonNegative] = []
    prefix_tokens_queried: NonNegative = 0
    prefix_tokens_hit: NonNegative = 0


class EngineReady(msgspec.Struct, tag="ready", kw_only=True):
    """Sent to every worker when it connects and the model is loaded."""

    pid: int
    max_model_len: Positive
    vocab_size: Positive
    max_num_seqs: Positive
    device: str
    dtype: str
    num_text_tokens: NonNegative
    num_image_tiles: NonNegative


class SequenceOutput(msgspec.Struct, kw_only=True):
    """New tokens of one request; the last one says why it ended.

    token_ids hold the stopping token too. finish_reason is None while the
    request goes on. stop_token_id is set where one of the request's own
    stop_token_ids matched. logprobs holds one entry a token where the request
    asked for them, else none. num_cached_tokens comes with the first output: how
    many of the prompt's tokens the prefix cache had. So do queue_s, the seconds until the
    request first ran, and prompt_logprobs, where
    asked for: an entry a token, None at the first and at `<|image|>`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] = []
    num_cached_tokens: NonNegative = 0
    queue_s: float = 0.0
    prompt_logprobs: list[PromptLogprobs | None] | None = None


class Refusal(msgspec.Struct, kw_only=True):
    """What a newcomer of priority 0 would be told instead of being queued."""

    message: str
    retry_after_s: float


class StepOutputs(msgspec.Struct, tag="step", kw_only=True):
    """What one step brought for one worker. refusal: where nobody has room behind that step."""

    outputs: list[SequenceOutput]
    refusal: Refusal | None = None


class RequestsBegun(msgspec.Struct, tag="begun"):
    """Sent before the step that computes them first, where there are several engines.

    What an engine dies of has begun, and is not asked of another one.
    """

    request_ids: list[str]


class RequestFailed(msgspec.Struct, tag="failed", kw_only=True):
    """A request's final message where it could not be served."""

    request_id: str
    kind: FailureKind
    message: str
    retry_after_s: float | None = None


class Heartbeat(msgspec.Struct, tag="heartbeat", kw_only=True):
    """Sent every heartbeat_interval_s.

    step_age_s: the age of the running step, 0 when idle. stall_s: how long that step
    has shown no progress. may_compile: no step of its kind was computed before, so that
    it may be compiling kernels, which shows no progress either.
    """

    stats: EngineStats
    step_age_s: float = 0.0
    stall_s: float = 0.0
    may_compile: bool = False


ToEngine = AddRequest | AbortRequests
FromEngine = EngineReady | StepOutputs | RequestsBegun | RequestFailed | Heartbeat
