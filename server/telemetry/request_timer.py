"""Times one request in the engine, from its arrival to its end.

Owns what is measured and when. Writes it into the metrics and into the HTTP request's record.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ...router.messages import AddRequest
from .request_record import Timings, current_record

if TYPE_CHECKING:
    from .metrics import FinishedReason, Metrics


class RequestTimer:
    """Times one request in the engine; counts exactly one end of it.

    Writes what it measures into the HTTP request's record too.
    """

    def __init__(self, metrics: Metrics, requests: Sequence[AddRequest]) -> None:
        self._metrics = metrics
        self._record = record = current_record()
        self._admitted = time.monotonic()
        self._first: float | None = None
        self._last: dict[str, float] = {}
        self._num_tokens = 0
        self._queue_s = self._vision_s = 0.0
        self._is_over = False
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        record.admitted = record.admitted or self._admitted
        record.prompt_tokens += num_prompt_tokens
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.request_prompt_tokens.observe(num_prompt_tokens)
        metrics.request_params_n.observe(len(requests[0].answer_ids))
        metrics.request_params_max_tokens.observe(max(request.max_tokens for request in requests))
        metrics.request_images.observe(sum(len(request.images) for request in requests))

    @property
    def timings(self) -> Timings:
        """Where the time went until the last token; all 0 before the first."""
        record, first = self._record, self._first
        if first is None:
            return Timings()
        last = max(self._last.values())
        began, ended = record.images_started, record.images_ended
        return Timings(
            images_s=0.0 if began is None or ended is None else ended - began,
            queue_s=self._queue_s,
            vision_s=self._vision_s,
            prefill_s=self._prefill_s(first),
            decode_s=last - first,
            ttft_s=first - record.started,
            total_s=last - record.started,
        )

    def tokens(
        self, request_id: str, count: int, queue_s: float = 0.0, vision_s: float = 0.0
    ) -> None:
        """Count tokens that arrived for one answer. queue_s, vision_s: of its first output."""
        self._vision_s += vision_s
        if not count:
            return
        now = time.monotonic()
        if self._first is None:
            self._observe_first_token(now, queue_s)
        last = self._last.get(request_id)
        if last is not None:
            gap_s = (now - last) / count
            self._metrics.time_per_output_token.observe(gap_s)
            for _ in range(count):
                self._metrics.inter_token_latency.observe(gap_s)
        self._last[request_id] = self._record.last_token = now
        self._num_tokens += count
        self._record.completion_tokens += count
        self._metrics.generation_tokens.inc(count)

    def end_answer(self, reason: Literal["stop", "length", "tool_calls"]) -> None:
        """One of the request's answers is complete."""
        self._record.finish_reasons.append(reason)

    def finish(self, reason: Literal["stop", "length", "tool_calls"]) -> None:
        """The request was answered. reason: the finish reason of its last answer."""
        self._metrics.request_success.inc()
        self._observe_decode()
        self._close(reason)

    def fail(self) -> None:
        """The engine failed the request."""
        self._metrics.request_failure.inc()
        self._record.finish_reasons.append("error")
        self._close("error")

    def leave(self) -> None:
        """The client left. Does nothing after another end."""
        if not self._is_over:
            self._record.finish_reasons.append("abort")
        self._close("abort")

    def _observe_first_token(self, now: float, queue_s: float) -> None:
        self._first, self._queue_s = now, queue_s
        record = self._record
        if record.first_token is None:
            record.first_token, record.queue_s = now, queue_s
        self._metrics.time_to_first_token.observe(now - record.started)
        self._metrics.request_queue_time.observe(queue_s)
        self._metrics.request_prefill_time.observe(self._prefill_s(now))

    def _prefill_s(self, first: float) -> float:
        """From the first step to the first token, which came at `first`."""
        return max(0.0, first - self._admitted - self._queue_s)

    def _observe_decode(self) -> None:
        if self._first is not None:
            last = max(self._last.values())
            self._metrics.request_decode_time.observe(last - self._first)
            inference_s = last - self._admitted - self._queue_s
            self._metrics.request_inference_time.observe(max(0.0, inference_s))

    def _close(self, reason: FinishedReason) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._metrics.request_finish.labels(reason).inc()
        self._metrics.e2e_request_latency.observe(time.monotonic() - self._record.started)
        self._metrics.request_generation_tokens.observe(self._num_tokens)
