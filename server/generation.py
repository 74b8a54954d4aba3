"""One generation from a conversation to text: what every API has in common.

Owns the way of a request between the schemas: prompt, images, engine, text,
usage. Knows nothing of HTTP, nor of the form in which a client asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..models.batch import ImageTiles, SamplingParams
from ..router.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
)
from ..router.messages import AddRequest, EngineReady, EngineStats, SequenceOutput
from .conversation import ImagePart, Message
from .detokenizer import Detokenizer, Piece, StopStrings
from .errors import ApiError, BadRequestError, InternalError, NotReadyError, OverloadedError
from .images.settings import ImageError, ImageRequest, PoolClosed
from .logprobs import TokenEntry, TokenReader
from .metrics import Metrics
from .prompt import PreparedPrompt, Processor, PromptTooLongError

logger = logging.getLogger(__name__)

# Longer texts are tokenized in a thread, so that the event loop goes on.
MAX_INLINE_CHARS = 4_000


@dataclass(slots=True, frozen=True, kw_only=True)
class GenerationRequest:
    """What to generate, however it was asked for. max_tokens None: what the context leaves.

    tenant: only with requests of the same tenant are cached pictures and texts shared.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    tenant: str = ""


@dataclass(slots=True, frozen=True)
class Usage:
    """Tokens of a request; the stopping token counts.

    cached_tokens: those of the prompt that were not computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True, frozen=True)
class TextDelta:
    """A piece of the answer, never empty.

    logprobs: of the tokens since the last piece, where the request asked. A token
    whose text is held back, as half a character or the start of a stop string,
    is told of with the next piece.
    """

    text: str
    logprobs: tuple[TokenEntry, ...] = ()


@dataclass(slots=True, frozen=True)
class Finish:
    """The last event: why the answer ended.

    stop_reason: None at an end of turn, else the stop string or token id that
    matched. is_end_of_message: the turn ended by `<|eom_id|>`. logprobs: of the
    tokens after the last piece, the stopping token's among them.
    """

    reason: Literal["stop", "length"]
    stop_reason: str | int | None
    usage: Usage
    is_end_of_message: bool = False
    logprobs: tuple[TokenEntry, ...] = ()


Event = TextDelta | Finish


@dataclass(slots=True, frozen=True)
class Answer:
    """A whole answer; logprobs: one entry for each token that usage counts, where asked."""

    text: str
    finish: Finish
    logprobs: tuple[TokenEntry, ...] = ()


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


class Images(Protocol):
    """What is used of `images.loader.ImageLoader`."""

    async def load(
        self, images: Sequence[ImageRequest], deadline: float | None = None
    ) -> list[ImageTiles]: ...


def sampling_params(
    temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> SamplingParams:
    """The API's defaults where a field is None; a random seed where none is given."""
    return SamplingParams(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=top_k or -1,
        # The sign has no meaning for a random stream: 63 bits, never negative.
        seed=secrets.randbits(63) if seed is None else seed & (2**63 - 1),
    )


@dataclass(slots=True, frozen=True)
class PreparedGeneration:
    """A request that passed every check but the engine's own."""

    request: AddRequest
    stop: tuple[str, ...]


class Generator:
    """Serves generation requests by a processor, an image loader and an engine."""

    def __init__(
        self,
        processor: Processor,
        images: Images,
        engine: Engine,
        metrics: Metrics,
        image_deadline_s: float = 30.0,
    ) -> None:
        self._processor = processor
        self._reader = TokenReader(processor.tokenizer)
        self._images = images
        self._engine = engine
        self._metrics = metrics
        self._image_deadline_s = image_deadline_s

    async def prepare(self, request: GenerationRequest) -> PreparedGeneration:
        """The engine's request: the prompt is checked before any image is fetched.

        Raises BadRequestError, or NotReadyError while there is no engine.
        """
        info = self._engine.info
        if info is None or not self._engine.is_ready:
            raise NotReadyError("Service is not ready.", retry_after_s=1.0)
        _check_against(info, request)
        prompt = await self._prompt(request, info.max_model_len)
        max_tokens = _room(request, len(prompt.token_ids), info.max_model_len)
        _check_min_tokens(request.sampling.min_tokens, max_tokens)
        tiles = await self._tiles(prompt.images, request.tenant)
        added = AddRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            images=tiles,
            spans=prompt.spans,
            sampling=request.sampling,
            max_tokens=max_tokens,
            eos_token_ids=[] if request.ignore_eos else self._processor.eos_token_ids,
            stop_token_ids=list(request.stop_token_ids),
            tenant=request.tenant,
        )
        return PreparedGeneration(added, request.stop)

    async def stream(self, prepared: PreparedGeneration) -> AsyncGenerator[Event, None]:
        """The answer's pieces, and one Finish. Closing the iterator aborts the request.

        Raises ApiError: before the first event if the engine refuses the request.
        """
        growing = GrowingAnswer(prepared, self._processor, self._reader)
        timer = self._metrics.start(len(prepared.request.prompt_token_ids))
        try:
            async with contextlib.aclosing(self._engine.generate(prepared.request)) as outputs:
                async for output in outputs:
                    timer.tokens(len(output.token_ids))
                    for event in growing.take(output):
                        # Counted before it is told: nobody may come back after a Finish.
                        if isinstance(event, Finish):
                            timer.finish(event.reason)
                        yield event
                        if isinstance(event, Finish):
                            return
        except EngineError as error:
            timer.fail()
            raise api_error_of(error) from error
        finally:
            timer.leave()
            logger.info("request %s: %s", prepared.request.request_id, timer.summary)
        raise InternalError("the engine ended the request without an answer")

    async def answer(self, prepared: PreparedGeneration) -> Answer:
        """The whole answer: the pieces of `stream`, joined."""
        texts: list[str] = []
        logprobs: list[TokenEntry] = []
        async with contextlib.aclosing(self.stream(prepared)) as events:
            async for event in events:
                logprobs += event.logprobs
                if isinstance(event, Finish):
                    return Answer("".join(texts), event, tuple(logprobs))
                texts.append(event.text)
        raise AssertionError("a stream of events ends with a Finish or an error")

    async def _prompt(self, request: GenerationRequest, max_model_len: int) -> PreparedPrompt:
        num_chars = sum(len(message.text) for message in request.messages)
        prepare = self._processor.prepare
        try:
            if num_chars <= MAX_INLINE_CHARS:
                return prepare(request.messages, max_model_len - 1)
            return await asyncio.to_thread(prepare, request.messages, max_model_len - 1)
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


class GrowingAnswer:
    """Turns the engine's outputs for one request into events."""

    def __init__(
        self, prepared: PreparedGeneration, processor: Processor, reader: TokenReader
    ) -> None:
        self._text = Detokenizer(processor.tokenizer, special_ids=processor.special_ids)
        self._stops = StopStrings(prepared.stop)
        self._reader = reader
        self._end_of_message_id = processor.end_of_message_id
        self._num_prompt = len(prepared.request.prompt_token_ids)
        self._min_tokens = prepared.request.sampling.min_tokens
        self._num_tokens = 0
        self._num_cached = 0
        self._untold: list[TokenEntry] = []

    def take(self, output: SequenceOutput) -> list[Event]:
        """The text that became due, then a Finish if this is the end.

        A stop string ends the answer at the token that completes it: later
        tokens of the same output are neither shown nor counted.
        Raises InternalError if the engine aborted the request.
        """
        if output.finish_reason == "abort":
            raise InternalError("the engine aborted the request")
        self._num_cached += output.num_cached_tokens  # told once, with the first output
        num_shown = len(output.token_ids) - (output.finish_reason == "stop")
        text = ""
        for place in range(num_shown):
            self._count(output, place)
            piece = self._cut(self._text.push(output.token_ids[place]).text)
            text += piece.text
            if piece.stop is not None:
                return [*self._delta(text), self._finish("stop", piece.stop)]
        return self._delta(text) if output.finish_reason is None else self._end(text, output)

    def _count(self, output: SequenceOutput, place: int) -> None:
        self._num_tokens += 1
        if output.logprobs:
            token_id, logprobs = output.token_ids[place], output.logprobs[place]
            self._untold.append(self._reader.entry(token_id, logprobs))

    def _cut(self, text: str) -> Piece:
        """What of the text is due; the text of the first min_tokens tokens stops nothing."""
        if not text or self._num_tokens <= self._min_tokens:
            return Piece(text)
        return self._stops.push(text)

    def _end(self, text: str, output: SequenceOutput) -> list[Event]:
        tail = self._cut(self._text.flush().text)
        held = self._stops.flush() if tail.stop is None else ""
        events = self._delta(text + tail.text + held)
        if output.finish_reason == "stop":
            self._count(output, -1)
        if tail.stop is not None:
            return [*events, self._finish("stop", tail.stop)]
        if output.finish_reason == "length":
            return [*events, self._finish("length", None)]
        is_end_of_message = output.token_ids[-1:] == [self._end_of_message_id]
        return [*events, self._finish("stop", output.stop_token_id, is_end_of_message)]

    def _delta(self, text: str) -> list[Event]:
        return [TextDelta(text, self._tell())] if text else []

    def _finish(
        self,
        reason: Literal["stop", "length"],
        stop_reason: str | int | None,
        is_end_of_message: bool = False,
    ) -> Finish:
        usage = Usage(self._num_prompt, self._num_tokens, self._num_cached)
        return Finish(reason, stop_reason, usage, is_end_of_message, self._tell())

    def _tell(self) -> tuple[TokenEntry, ...]:
        """The entries that no event has told of yet."""
        entries = tuple(self._untold)
        self._untold.clear()
        return entries


def api_error_of(error: EngineError) -> ApiError:
    """The client's error for the engine's."""
    if isinstance(error, QueueFullError):
        return OverloadedError(str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, InvalidRequestError):
        return BadRequestError(str(error))
    if isinstance(error, EngineDeadError):
        return NotReadyError("the engine is not available: try again later", retry_after_s=1.0)
    return InternalError("the model could not compute this request")


def _check_against(info: EngineReady, request: GenerationRequest) -> None:
    """Refuse what the loaded model cannot do, before any work."""
    if request.max_tokens is not None and request.max_tokens >= info.max_model_len:
        field = request.max_tokens_field
        raise BadRequestError(
            f"{field} is {request.max_tokens:,}; max_model_len is {info.max_model_len:,}"
            " with the prompt: lower it or start with a larger --max-model-len",
            param=field,
        )
    biased = [token_id for token_id, _ in request.sampling.logit_bias]
    for field, token_ids in (("stop_token_ids", request.stop_token_ids), ("logit_bias", biased)):
        if token_ids and max(token_ids) >= info.vocab_size:
            raise BadRequestError(
                f"{field} holds {max(token_ids)}; the vocabulary ends at {info.vocab_size - 1}",
                param=field,
            )


def _check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        raise BadRequestError(
            f"min_tokens is {min_tokens:,}, but at most {max_tokens:,} tokens may be generated:"
            " lower it or raise max_tokens",
            param="min_tokens",
        )


def _room(request: GenerationRequest, num_prompt: int, max_model_len: int) -> int:
    """How many tokens may be generated.

    Raises BadRequestError if prompt and max_tokens do not fit the context.
    """
    left = max_model_len - num_prompt
    if request.max_tokens is None:
        return left
    if request.max_tokens > left:
        field = request.max_tokens_field
        raise BadRequestError(
            f"the prompt has {num_prompt:,} tokens and {field} is {request.max_tokens:,};"
            f" max_model_len is {max_model_len:,}: lower {field} to {left:,} or shorten the prompt",
            param=field,
        )
    return request.max_tokens
