"""One generation from a conversation to text: what every API has in common.

Owns the way of a request between the schemas: prompt, images, engine, text,
usage. Knows nothing of HTTP, nor of the form in which a client asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..models.batch import ImageTiles
from ..router.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)
from ..router.messages import AddRequest, EngineReady, EngineStats, SequenceOutput
from .answers import Completion, End, Event, Finish, GatheredAnswer, GrowingAnswer, Usage
from .conversation import ImagePart
from .errors import (
    ApiError,
    BadRequestError,
    DeadlineError,
    InternalError,
    NotReadyError,
    OverloadedError,
)
from .grammar_checks import GrammarChecks
from .images.settings import ImageError, ImageRequest, PoolClosed
from .logprobs import PromptEntries, TokenReader
from .metrics import Metrics, RequestTimer
from .prompt import PreparedPrompt, Processor, PromptTooLongError
from .requests import (
    GenerationRequest,
    check_against,
    check_min_tokens,
    check_prompt_logprobs,
    room,
)
from .tools.parser import ToolCallParser

logger = logging.getLogger(__name__)

# Longer texts are tokenized in a thread, so that the event loop goes on.
MAX_INLINE_CHARS = 4_000


class Engine(Protocol):
    """What is used of `router.client.EngineClient`."""

    @property
    def is_ready(self) -> bool: ...
    @property
    def info(self) -> EngineReady | None: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def heartbeat_age_s(self) -> float: ...
    def generate(self, request: AddRequest) -> AsyncGenerator[SequenceOutput, None]: ...
    def leave(self, request_id: str) -> None: ...


class Images(Protocol):
    """What is used of `images.loader.ImageLoader`."""

    async def load(
        self, images: Sequence[ImageRequest], deadline: float | None = None
    ) -> list[ImageTiles]: ...


@dataclass(slots=True, frozen=True)
class PreparedGeneration:
    """A request that passed every check but the engine's own.

    deadline: when it is given up, in the loop's time; infinite where it never is.
    """

    request: AddRequest
    stop: tuple[str, ...]
    deadline: float = math.inf
    tool_names: tuple[str, ...] = ()
    max_tool_calls: int | None = None


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
        self._images = images
        self._engine = engine
        self._metrics = metrics
        self._image_deadline_s = image_deadline_s
        self._max_request_time_s = max_request_time_s
        self._grammar_checks = grammar_checks

    async def prepare(self, request: GenerationRequest) -> PreparedGeneration:
        """The engine's request: the prompt is checked before any image is fetched.

        Raises BadRequestError, NotReadyError while there is no engine, or DeadlineError.
        """
        timeout_s = min(request.timeout_s or math.inf, self._max_request_time_s)
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with _until(deadline):
                return await self._prepare(request, deadline)
        except DeadlineError:
            self._metrics.expire()
            raise

    async def _prepare(self, request: GenerationRequest, deadline: float) -> PreparedGeneration:
        info = self._engine.info
        if info is None or not self._engine.is_ready:
            raise NotReadyError("Service is not ready.", retry_after_s=1.0)
        check_against(info, request)
        prompt = await self._prompt(request, info.max_model_len)
        max_tokens = room(request, len(prompt.token_ids), info.max_model_len)
        check_min_tokens(request.sampling.min_tokens, max_tokens)
        check_prompt_logprobs(request, len(prompt.token_ids))
        grammar = await self._grammar(request)
        tiles = await self._tiles(prompt.images, request.tenant)
        added = AddRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            images=tiles,
            spans=prompt.spans,
            sampling=request.sampling,
            max_tokens=max_tokens,
            # A grammar says itself where an answer may end.
            eos_token_ids=[]
            if request.ignore_eos and not grammar
            else self._processor.eos_token_ids,
            stop_token_ids=list(request.stop_token_ids),
            tenant=request.tenant,
            choice_ids=[uuid.uuid4().hex for _ in range(1, request.num_choices)],
            priority=request.priority,
            num_prompt_logprobs=request.num_prompt_logprobs,
            grammar=grammar,
        )
        return PreparedGeneration(
            added,
            request.stop,
            deadline,
            tool_names=tuple(tool.name for tool in request.tools),
            max_tool_calls=request.max_tool_calls,
        )

    async def stream(self, prepared: PreparedGeneration) -> AsyncGenerator[Event, None]:
        """The answers' pieces, a Finish a choice, and an End. Closing it aborts the request.

        Raises ApiError: before the first event if the engine refuses the request.
        """
        timer = self._metrics.start(len(prepared.request.prompt_token_ids))
        # Else nothing ends a request whose reader has stopped reading.
        expiry = self._leave_at(prepared)
        try:
            async with (
                contextlib.aclosing(self._engine.generate(prepared.request)) as outputs,
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
            expiry.cancel()
            timer.leave()
            logger.info("request %s: %s", prepared.request.request_id, timer.summary)

    async def _events(
        self,
        prepared: PreparedGeneration,
        outputs: AsyncGenerator[SequenceOutput, None],
        timer: RequestTimer,
    ) -> AsyncGenerator[Event, None]:
        growing = self._growing_answers(prepared)
        usages: dict[int, Usage] = {}
        prompt: PromptEntries | None = None
        while growing:
            output = await _next_output(outputs, prepared.deadline)
            timer.tokens(len(output.token_ids))
            if output.prompt_logprobs is not None:
                prompt = self._reader.prompt_entries(output.prompt_logprobs)
            for event in growing[output.request_id].take(output):
                if isinstance(event, Finish):
                    del growing[output.request_id]
                    usages[event.choice] = event.usage
                    # A stop string ends an answer here first.
                    self._engine.leave(output.request_id)
                    if not growing:
                        # Counted before it is told: nobody may come back after a Finish.
                        timer.finish(event.reason)
                yield event
        yield End(_total(usages), prompt)

    def _leave_at(self, prepared: PreparedGeneration) -> asyncio.TimerHandle:
        """Have the engine free the request at its deadline, whoever waits for what then."""
        request = prepared.request

        def leave() -> None:
            for request_id in request.answer_ids:
                self._engine.leave(request_id)

        return asyncio.get_running_loop().call_at(prepared.deadline, leave)

    def _growing_answers(self, prepared: PreparedGeneration) -> dict[str, GrowingAnswer]:
        """The answers that have not ended, by the ids under which the engine has them."""
        request = prepared.request
        return {
            request_id: GrowingAnswer(
                request,
                prepared.stop,
                self._processor,
                self._reader,
                choice,
                _tool_parser(prepared),
            )
            for choice, request_id in enumerate(request.answer_ids)
        }

    async def answer(self, prepared: PreparedGeneration) -> Completion:
        """The whole answers: the pieces of `stream`, joined."""
        num_choices = len(prepared.request.answer_ids)
        gathered = [GatheredAnswer() for _ in range(num_choices)]
        async with contextlib.aclosing(self.stream(prepared)) as events:
            async for event in events:
                if isinstance(event, End):
                    in_order = tuple(one.whole() for one in gathered)
                    return Completion(in_order, event.usage, event.prompt_logprobs)
                gathered[event.choice].add(event)
        raise AssertionError("a stream of events ends with an End or an error")

    async def _grammar(self, request: GenerationRequest) -> str | None:
        """The request's grammar as the engine takes it. Raises BadRequestError."""
        if request.grammar is None:
            return None
        return await self._grammar_checks.check(request.grammar, request.grammar_field)

    async def _prompt(self, request: GenerationRequest, max_model_len: int) -> PreparedPrompt:
        num_chars = sum(len(message.text) for message in request.messages)
        has_json = bool(request.tools) or any(one.tool_calls for one in request.messages)
        prepare = functools.partial(
            self._processor.prepare,
            request.messages,
            max_model_len - 1,
            request.tools,
            request.tool_format,
        )
        try:
            if num_chars <= MAX_INLINE_CHARS and not has_json:
                return prepare()
            return await asyncio.to_thread(prepare)
        except PromptTooLongError as error:
            raise BadRequestError(str(error), param="messages") from error

    async def _tiles(self, images: Sequence[ImagePart], tenant: str) -> list[ImageTiles]:
        if not images:
            return []
        wanted = [ImageRequest(image.url, image.max_tiles, tenant) for image in images]
        deadline = asyncio.get_running_loop().time() + self._image_deadline_s
        try:
            return await self._images.load(wanted, deadline)
        except ImageError as error:
            field = "messages" if error.index is None else images[error.index].field
            raise BadRequestError(f"{field}: {error.message}", param=field) from error
        except TimeoutError as error:
            raise BadRequestError(
                f"the images took longer than {self._image_deadline_s:g} s to load: send fewer or"
                " smaller ones, or as data URLs",
                param="messages",
            ) from error
        except PoolClosed as error:
            raise NotReadyError("the server is stopping: try again", retry_after_s=1.0) from error


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
        raise _deadline_error()
    async with _until(deadline):
        try:
            return await anext(outputs)
        except StopAsyncIteration:
            raise InternalError("the engine ended the request without an answer") from None


@contextlib.asynccontextmanager
async def _until(deadline: float) -> AsyncGenerator[None, None]:
    """Raise DeadlineError where the block takes longer."""
    try:
        async with asyncio.timeout_at(None if deadline == math.inf else deadline) as scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise _deadline_error() from error


def _deadline_error() -> DeadlineError:
    return DeadlineError(
        "the request took longer than its timeout: ask for fewer tokens, raise timeout_s or"
        " start the server with a larger --max-request-time"
    )


def _total(usages: dict[int, Usage]) -> Usage:
    """The usage of a request: its prompt counts once."""
    completion_tokens = sum(usage.completion_tokens for usage in usages.values())
    return replace(usages[0], completion_tokens=completion_tokens)


def api_error_of(error: EngineError) -> ApiError:
    """The client's error for the engine's."""
    if isinstance(error, QueueFullError):
        return OverloadedError(str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, InvalidRequestError):
        return BadRequestError(str(error))
    if isinstance(error, EngineDeadError):
        return NotReadyError("the engine is not available: try again later", retry_after_s=1.0)
    return InternalError("the model could not compute this request")
