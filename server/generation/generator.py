"""Generates answers: sends a prepared request to the engine and returns events.

Owns the path of a request that every API shares: prepare, send to the engine, turn its outputs into
events, count usage. Knows nothing of HTTP, of the client's format, or of how a prompt is built.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Protocol

from ...models.batch import AdapterInfo, AdapterRef
from ...router.client.engine_client import Health
from ...router.errors import (
    AdapterUnusableError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    TooManyRequestsError,
)
from ...router.messages import AddRequest, EngineReady, EngineStats, SequenceOutput
from ..admission.fair_lane import FairLane
from ..admission.lanes import Lanes
from ..errors import (
    ApiError,
    BadRequestError,
    DeadEndError,
    DeadlineError,
    InternalError,
    NotReadyError,
    OverloadedError,
    RateLimitError,
)
from ..prompts.processor import Processor
from ..structured_output.compile_checks import GrammarChecks
from ..telemetry.metrics import Metrics
from ..telemetry.request_timer import RequestTimer
from .answer_stream import AnswerStream
from .completion import Completion, EntryLog
from .deadlines import deadline_error, until
from .events import End, Event, Finish, PromptLogprobs, Usage
from .preparer import Images, PreparedGeneration, Preparer
from .request import MAX_ANSWER_LOGPROBS, GenerationRequest, TextOptions
from .token_text import TokenReader
from .tool_calls.parser import ToolCallParser

logger = logging.getLogger(__name__)


class Engine(Health, Protocol):
    """The part of `router.client.EngineClient` that a generator uses."""

    @property
    def info(self) -> EngineReady | None: ...
    @property
    def stats(self) -> EngineStats: ...
    def generate(self, *requests: AddRequest) -> AsyncGenerator[SequenceOutput, None]: ...
    def leave(self, request_id: str) -> None: ...
    async def load_adapter(self, adapter: AdapterRef) -> AdapterInfo: ...
    async def unload_adapter(self, digest: str) -> None: ...
    def rejection(self, owner: str, priority: int) -> QueueFullError | None: ...


class Generator:
    """Serves generation requests with a processor, an image loader and an engine."""

    def __init__(
        self,
        processor: Processor,
        images: Images,
        engine: Engine,
        metrics: Metrics,
        image_deadline_s: float = 30.0,
        max_request_time_s: float = math.inf,
        *,
        grammar_checks: GrammarChecks,
        max_answers: int | None = None,
        threads: FairLane | None = None,
        max_answer_logprobs: int = MAX_ANSWER_LOGPROBS,
    ) -> None:
        self._processor = processor
        self._readers = _Readers(processor)
        self._engine = engine
        self._metrics = metrics
        self._max_request_time_s = max_request_time_s
        self._preparer = Preparer(
            processor,
            images,
            image_deadline_s,
            grammar_checks,
            max_answers,
            threads=threads or Lanes().threads(),
            max_answer_logprobs=max_answer_logprobs,
        )
        self.is_draining = False
        self.num_open = 0

    async def prepare(self, request: GenerationRequest) -> PreparedGeneration:
        """Check the request and build the engine's request.

        Raises BadRequestError; NotReadyError while there is no engine; OverloadedError if the
        engine's queue is known to be full; or DeadlineError.
        """
        timeout_s = min(request.timeout_s or math.inf, self._max_request_time_s)
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            with self._counted():
                async with until(deadline):
                    return await self._prepare(request, deadline)
        except DeadlineError:
            self._metrics.fail_early()
            raise

    async def _prepare(self, request: GenerationRequest, deadline: float) -> PreparedGeneration:
        if self.is_draining:
            raise NotReadyError("the server is stopping: try again", retry_after_s=1.0)
        info = self._engine.info
        if info is None or not self._engine.is_ready:
            raise NotReadyError("Service is not ready.", retry_after_s=1.0)
        # Before any work: else images would be fetched, decoded and sent for nothing.
        rejection = self._engine.rejection(request.owner, request.priority)
        if rejection is not None:
            self._metrics.fail_early()
            raise api_error_of(rejection)
        return await self._preparer.prepare(request, info, deadline)

    async def stream(
        self, prepared: PreparedGeneration, logs: Mapping[int, EntryLog] | None = None
    ) -> AsyncGenerator[Event, None]:
        """Pieces of the answers, a Finish for each choice, then an End. Closing it aborts all.

        The log-probabilities of a prompt come before all pieces of its answers. logs: by choice,
        where those of the answers go; without them, they come with the events.
        Raises ApiError, before the first event if the engine rejects the request.
        """
        timer = self._metrics.start(prepared.requests)
        # Without it, a request whose client stopped reading would never end.
        expiry = self._leave_at(prepared)
        self.num_open += 1
        try:
            async with (
                contextlib.aclosing(self._engine.generate(*prepared.requests)) as outputs,
                contextlib.aclosing(self._events(prepared, outputs, timer, logs or {})) as events,
            ):
                async for event in events:
                    yield event
        except EngineError as error:
            timer.fail()
            raise api_error_of(error) from error
        except DeadEndError as error:
            timer.fail()
            self._metrics.form_dead_ends.inc()
            logger.warning("a request failed: %s", error.message)
            raise
        except DeadlineError:
            timer.fail()
            raise
        finally:
            self.num_open -= 1
            expiry.cancel()
            timer.leave()
            logger.debug("engine request %s finished", prepared.answer_ids[0])

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the block's request as open."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    async def _events(
        self,
        prepared: PreparedGeneration,
        outputs: AsyncGenerator[SequenceOutput, None],
        timer: RequestTimer,
        logs: Mapping[int, EntryLog],
    ) -> AsyncGenerator[Event, None]:
        streams = self._answer_streams(prepared, logs)
        usages: dict[int, Usage] = {}
        while streams:
            output = await _next_output(outputs, prepared.deadline)
            timer.tokens(output.request_id, len(output.token_ids), output.queue_s, output.vision_s)
            prepared.on_tokens(len(output.token_ids))
            if output.prompt_logprobs is not None:
                yield self._prompt_logprobs(prepared, output)
            for event in streams[output.request_id].take(output):
                if isinstance(event, Finish):
                    del streams[output.request_id]
                    usages[event.choice] = event.usage
                    timer.end_answer(event.reason)
                    # A stop string ends the answer here before the engine knows.
                    self._engine.leave(output.request_id)
                    if not streams:
                        # Count before the yield: the caller may stop reading after a Finish.
                        timer.finish(event.reason)
                yield event
        yield End(_total(usages, len(prepared.requests)), timer.timings)

    def _leave_at(self, prepared: PreparedGeneration) -> asyncio.TimerHandle:
        """Free the request in the engine at its deadline, even if nothing reads its events."""

        def leave() -> None:
            for request_id in prepared.answer_ids:
                self._engine.leave(request_id)

        return asyncio.get_running_loop().call_at(prepared.deadline, leave)

    def _answer_streams(
        self, prepared: PreparedGeneration, logs: Mapping[int, EntryLog]
    ) -> dict[str, AnswerStream]:
        """The unfinished answers by their ids in the engine."""
        pairs = [
            (request, answer_id)
            for request in prepared.requests
            for answer_id in request.answer_ids
        ]
        return {
            answer_id: AnswerStream(
                request,
                prepared.stop,
                self._processor,
                self._readers.of(prepared.text),
                choice,
                _tool_parser(prepared),
                options=prepared.text,
                form=prepared.form,
                log=logs.get(choice),
            )
            for choice, (request, answer_id) in enumerate(pairs)
        }

    def _prompt_logprobs(
        self, prepared: PreparedGeneration, output: SequenceOutput
    ) -> PromptLogprobs:
        """The event for the first output of a prompt's first answer."""
        assert output.prompt_logprobs is not None, "the caller checks it"
        ids = [request.request_id for request in prepared.requests]
        prompt = ids.index(output.request_id)
        token_ids = prepared.requests[prompt].prompt_token_ids
        reader = self._readers.of(prepared.text)
        return PromptLogprobs(
            prompt,
            tuple(map(reader.read, token_ids)),
            reader.prompt_entries(output.prompt_logprobs),
        )

    async def answer(
        self, prepared: PreparedGeneration, new_log: Callable[[], EntryLog] | None = None
    ) -> Completion:
        """The whole answers: all events of `stream`, joined. Raises as `stream` does.

        new_log: makes the log of one answer's log-probabilities; None: no answer has any.
        """
        logs = {}
        if new_log is not None:
            logs = {choice: new_log() for choice in range(len(prepared.answer_ids))}
        async with contextlib.aclosing(self.stream(prepared, logs)) as events:
            return await Completion.collect(events, logs)


class _Readers:
    """A token reader for each way to name tokens; each remembers the tokens that it read."""

    def __init__(self, processor: Processor) -> None:
        self._tokenizer = processor.tokenizer
        self._by_options: dict[tuple[bool, bool], TokenReader] = {}

    def of(self, options: TextOptions) -> TokenReader:
        key = (options.shows_special, options.names_by_id)
        if key not in self._by_options:
            self._by_options[key] = TokenReader(
                self._tokenizer,
                shows_special=options.shows_special,
                names_by_id=options.names_by_id,
            )
        return self._by_options[key]


def _tool_parser(prepared: PreparedGeneration) -> ToolCallParser | None:
    if not prepared.tool_names:
        # Without tools, text that looks like a call is text.
        return None
    return ToolCallParser(prepared.tool_names, prepared.max_tool_calls)


async def _next_output(
    outputs: AsyncGenerator[SequenceOutput, None], deadline: float
) -> SequenceOutput:
    """The engine's next output. Raises DeadlineError, or InternalError if there is none."""
    if asyncio.get_running_loop().time() >= deadline:
        # An output that is already here would be returned before the timeout below is checked.
        raise deadline_error()
    async with until(deadline):
        try:
            return await anext(outputs)
        except StopAsyncIteration:
            raise InternalError("the engine ended the request without an answer") from None


def _total(usages: dict[int, Usage], num_prompts: int) -> Usage:
    """The usage of a request; each prompt counts once, for any number of answers."""
    firsts = [usages[choice] for choice in range(0, len(usages), len(usages) // num_prompts)]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
        completion_tokens=sum(usage.completion_tokens for usage in usages.values()),
        cached_tokens=sum(usage.cached_tokens for usage in firsts),
    )


def api_error_of(error: EngineError) -> ApiError:
    """The API error for an engine's error."""
    if isinstance(error, TooManyRequestsError):
        return RateLimitError(str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, QueueFullError):
        return OverloadedError(str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, InvalidRequestError):
        return BadRequestError(str(error))
    if isinstance(error, AdapterUnusableError):
        return NotReadyError(
            "the adapter that the request names cannot be used; the server's log has the reason"
        )
    if isinstance(error, EngineDeadError):
        return NotReadyError("the engine is not available: try again later", retry_after_s=1.0)
    return InternalError("the model could not compute this request")
