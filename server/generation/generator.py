"""One generation from a conversation to text: what every API has in common.

Owns the way of a request between the schemas: what is asked of the engine, what comes of it,
usage. Knows nothing of HTTP, of the form in which a client asked, nor of how a prompt is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Iterator
from typing import Protocol

from ...router.client.engine_client import Health
from ...router.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)
from ...router.messages import AddRequest, EngineReady, EngineStats, SequenceOutput
from ..errors import (
    ApiError,
    BadRequestError,
    DeadlineError,
    InternalError,
    NotReadyError,
    OverloadedError,
)
from ..prompts.processor import Processor
from ..structured_output.compile_checks import GrammarChecks
from ..telemetry.metrics import Metrics, RequestTimer
from .answer_stream import (
    Completion,
    End,
    Event,
    Finish,
    GatheredAnswer,
    GrowingAnswer,
    PromptTold,
    Usage,
)
from .deadlines import deadline_error, until
from .preparer import Images, PreparedGeneration, Preparer
from .request import GenerationRequest
from .token_text import TokenReader
from .tool_calls.parser import ToolCallParser

logger = logging.getLogger(__name__)


class Engine(Health, Protocol):
    """What is used of `router.client.EngineClient`."""

    @property
    def info(self) -> EngineReady | None: ...
    @property
    def stats(self) -> EngineStats: ...
    def generate(self, *requests: AddRequest) -> AsyncGenerator[SequenceOutput, None]: ...
    def leave(self, request_id: str) -> None: ...
    def refusal(self, priority: int) -> QueueFullError | None: ...


class Generator:
    """Serves generation requests by a processor, an image loader and an engine."""

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
    ) -> None:
        self._processor = processor
        self._reader = TokenReader(processor.tokenizer)
        self._engine = engine
        self._metrics = metrics
        self._max_request_time_s = max_request_time_s
        self._preparer = Preparer(processor, images, image_deadline_s, grammar_checks)
        self.is_draining = False
        self.num_open = 0

    async def prepare(self, request: GenerationRequest) -> PreparedGeneration:
        """What the engine is asked.

        Raises BadRequestError, NotReadyError while there is no engine, OverloadedError where the
        engine is known to have no room, or DeadlineError.
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
        # Before any work: pictures would be fetched, decoded and sent over for nothing.
        if (refusal := self._engine.refusal(request.priority)) is not None:
            self._metrics.fail_early()
            raise api_error_of(refusal)
        return await self._preparer.prepare(request, info, deadline)

    async def stream(self, prepared: PreparedGeneration) -> AsyncGenerator[Event, None]:
        """The answers' pieces, a Finish a choice, and an End. Closing it aborts them all.

        What is told of a prompt comes before all pieces of its answers.
        Raises ApiError: before the first event if the engine refuses the request.
        """
        timer = self._metrics.start(prepared.requests)
        # Else nothing ends a request whose reader has stopped reading.
        expiry = self._leave_at(prepared)
        self.num_open += 1
        try:
            async with (
                contextlib.aclosing(self._engine.generate(*prepared.requests)) as outputs,
                contextlib.aclosing(self._events(prepared, outputs, timer)) as events,
            ):
                async for event in events:
                    yield event
        except EngineError as error:
            timer.fail()
            raise api_error_of(error) from error
        except DeadlineError:
            timer.fail()
            raise
        finally:
            self.num_open -= 1
            expiry.cancel()
            timer.leave()
            logger.debug("the engine's request %s is over", prepared.answer_ids[0])

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """The block's request is open."""
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
    ) -> AsyncGenerator[Event, None]:
        growing = self._growing_answers(prepared)
        usages: dict[int, Usage] = {}
        while growing:
            output = await _next_output(outputs, prepared.deadline)
            timer.tokens(output.request_id, len(output.token_ids), output.queue_s)
            if output.prompt_logprobs is not None:
                yield self._told(prepared, output)
            for event in growing[output.request_id].take(output):
                if isinstance(event, Finish):
                    del growing[output.request_id]
                    usages[event.choice] = event.usage
                    timer.end_answer(event.reason)
                    # A stop string ends an answer here first.
                    self._engine.leave(output.request_id)
                    if not growing:
                        # Counted before it is told: nobody may come back after a Finish.
                        timer.finish(event.reason)
                yield event
        yield End(_total(usages, len(prepared.requests)))

    def _leave_at(self, prepared: PreparedGeneration) -> asyncio.TimerHandle:
        """Have the engine free the request at its deadline, whoever waits for what then."""

        def leave() -> None:
            for request_id in prepared.answer_ids:
                self._engine.leave(request_id)

        return asyncio.get_running_loop().call_at(prepared.deadline, leave)

    def _growing_answers(self, prepared: PreparedGeneration) -> dict[str, GrowingAnswer]:
        """The answers that have not ended, by the ids under which the engine has them."""
        pairs = [(one, answer_id) for one in prepared.requests for answer_id in one.answer_ids]
        return {
            answer_id: GrowingAnswer(
                request,
                prepared.stop,
                self._processor,
                self._reader,
                choice,
                _tool_parser(prepared),
            )
            for choice, (request, answer_id) in enumerate(pairs)
        }

    def _told(self, prepared: PreparedGeneration, output: SequenceOutput) -> PromptTold:
        """What came with the first output of a prompt's first answer."""
        assert output.prompt_logprobs is not None, "the caller looked"
        ids = [request.request_id for request in prepared.requests]
        prompt = ids.index(output.request_id)
        token_ids = prepared.requests[prompt].prompt_token_ids
        return PromptTold(
            prompt,
            tuple(map(self._reader.read, token_ids)),
            self._reader.prompt_entries(output.prompt_logprobs),
        )

    async def answer(self, prepared: PreparedGeneration) -> Completion:
        """The whole answers: the pieces of `stream`, joined."""
        gathered = [GatheredAnswer() for _ in prepared.answer_ids]
        prompts: list[PromptTold] = []
        async with contextlib.aclosing(self.stream(prepared)) as events:
            async for event in events:
                if isinstance(event, End):
                    in_order = tuple(one.whole() for one in gathered)
                    prompts.sort(key=lambda told: told.prompt)
                    return Completion(in_order, event.usage, tuple(prompts))
                if isinstance(event, PromptTold):
                    prompts.append(event)
                else:
                    gathered[event.choice].add(event)
        raise AssertionError("a stream of events ends with an End or an error")


def _tool_parser(prepared: PreparedGeneration) -> ToolCallParser | None:
    if not prepared.tool_names:
        # Without tools, a text that looks like a call is text.
        return None
    return ToolCallParser(prepared.tool_names, prepared.max_tool_calls)


async def _next_output(
    outputs: AsyncGenerator[SequenceOutput, None], deadline: float
) -> SequenceOutput:
    """The engine's next output. Raises DeadlineError, or InternalError if there is none."""
    if asyncio.get_running_loop().time() >= deadline:
        # An output that is here already would be taken before the timeout below is looked at.
        raise deadline_error()
    async with until(deadline):
        try:
            return await anext(outputs)
        except StopAsyncIteration:
            raise InternalError("the engine ended the request without an answer") from None


def _total(usages: dict[int, Usage], num_prompts: int) -> Usage:
    """The usage of a request: each prompt counts once, however many answers it has."""
    firsts = [usages[choice] for choice in range(0, len(usages), len(usages) // num_prompts)]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
        completion_tokens=sum(usage.completion_tokens for usage in usages.values()),
        cached_tokens=sum(usage.cached_tokens for usage in firsts),
    )


def api_error_of(error: EngineError) -> ApiError:
    """The client's error for the engine's."""
    if isinstance(error, QueueFullError):
        return OverloadedError(str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, InvalidRequestError):
        return BadRequestError(str(error))
    if isinstance(error, EngineDeadError):
        return NotReadyError("the engine is not available: try again later", retry_after_s=1.0)
    return InternalError("the model could not compute this request")
