"""Turns a request into the engine's input: all checks, prompts, the grammar, images.

Owns the order of these steps. Knows nothing of HTTP, of the engine's work or of answers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ...models.batch import ImageTiles
from ...router.messages import AddRequest, EngineReady
from ..admission.fair_lane import FairLane
from ..errors import BadRequestError, DeadlineError, NotReadyError
from ..images.settings import ImageError, ImageRequest, PoolClosed
from ..prompts.conversation import ImagePart
from ..prompts.processor import PreparedPrompt, Processor, PromptTooLongError, image_spans
from ..prompts.rendering import MetaReason
from ..structured_output.compile_checks import GrammarChecks
from ..telemetry.request_record import current_record
from .prompt_errors import prompt_errors
from .request import (
    MAX_ANSWER_LOGPROBS,
    TEXT_AS_USUAL,
    GenerationRequest,
    PlainPrompt,
    TextOptions,
    check_against,
    check_answer_logprobs,
    check_answers,
    check_min_tokens,
    check_prompt_logprobs,
    check_token_ids,
    cut_to,
    room,
)

# Longer texts are tokenized in a thread, so that the event loop continues.
MAX_INLINE_CHARS = 4_000
# Of all prompts of a request, so that no body occupies a thread for seconds: four long contexts.
MAX_PROMPT_TOKENS = 524_288


# When to retry a request whose images waited too long for fetches or decoders.
IMAGE_RETRY_S = 5.0


# Without --max-answers-per-request, the limit is --max-num-seqs divided by this.
ANSWERS_PART = 4


class Images(Protocol):
    """The used part of `images.loader.ImageLoader`."""

    async def load(
        self, images: Sequence[ImageRequest], deadline: float | None = None
    ) -> list[ImageTiles]: ...


def _ignore(num_tokens: int) -> None:
    """Do nothing."""


@dataclass(slots=True, frozen=True)
class PreparedGeneration:
    """A request that passed every check except the engine's.

    requests: one per prompt, all with the same number of answers. deadline: when the request is
    cancelled, in the loop's time; infinite without a limit. on_tokens: called with each number of
    newly generated tokens. meta_reason: why the conversation is in Meta's format, if it is.
    """

    requests: tuple[AddRequest, ...]
    stop: tuple[str, ...]
    deadline: float = math.inf
    tool_names: tuple[str, ...] = ()
    max_tool_calls: int | None = None
    text: TextOptions = TEXT_AS_USUAL
    on_tokens: Callable[[int], None] = _ignore
    form: str = ""
    meta_reason: MetaReason | None = None

    @property
    def answer_ids(self) -> list[str]:
        """The engine's ids of all answers in the order of their choices: prompt by prompt."""
        return [answer_id for request in self.requests for answer_id in request.answer_ids]

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [request.prompt_token_ids for request in self.requests]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class Preparer:
    """Prepares requests with a processor, an image loader and the children that check grammars."""

    def __init__(
        self,
        processor: Processor,
        images: Images,
        image_deadline_s: float,
        grammar_checks: GrammarChecks,
        max_answers: int | None = None,
        *,
        threads: FairLane,
        max_answer_logprobs: int = MAX_ANSWER_LOGPROBS,
    ) -> None:
        """threads: the lane of prompts too long for the event loop."""
        self._processor = processor
        self._images = images
        self._image_deadline_s = image_deadline_s
        self._grammar_checks = grammar_checks
        self._max_answers = max_answers
        self._threads = threads
        self._max_answer_logprobs = max_answer_logprobs

    async def prepare(
        self, request: GenerationRequest, info: EngineReady, deadline: float
    ) -> PreparedGeneration:
        """The engine's input. Prompts are checked before any image is fetched.

        Raises BadRequestError, or NotReadyError while the server stops.
        """
        check_against(info, request)
        request = await self._with_banned_sequences(request)
        check_answers(request, self._max_answers or max(1, info.max_num_seqs // ANSWERS_PART))
        prompts = await self._prompts(request, info)
        check_prompt_logprobs(request, sum(len(prompt.token_ids) for prompt in prompts))
        # Before any work: the tokens that each prompt leaves for an answer.
        rooms = [room(request, len(one.token_ids), info.max_model_len) for one in prompts]
        rooms = check_answer_logprobs(request, rooms, self._max_answer_logprobs)
        check_min_tokens(request.sampling.min_tokens, min(rooms))
        grammar = await self._grammar(request)
        added = [
            await self._added(request, prompt, max_tokens, grammar)
            for prompt, max_tokens in zip(prompts, rooms, strict=True)
        ]
        return PreparedGeneration(
            _with_seeds(request, added),
            request.stop,
            deadline,
            tool_names=tuple(tool.name for tool in request.tools),
            max_tool_calls=request.max_tool_calls,
            text=request.text,
            form=request.grammar_field,
            meta_reason=prompts[0].meta_reason if prompts else None,
        )

    async def _with_banned_sequences(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the tokens of its bad words, as they are at the start and in a text.

        Other tokens may spell the same word. As vLLM.
        """
        if not request.bad_words:
            return request
        spellings = [
            spelling
            for word in request.bad_words
            for spelling in (word.lstrip(" ") or word, " " + word.lstrip(" "))
        ]

        def tokenize() -> tuple[tuple[int, ...], ...]:
            return tuple(dict.fromkeys(map(tuple, map(self._processor.tokens_of, spellings))))

        if sum(map(len, spellings)) <= MAX_INLINE_CHARS:
            sequences = tokenize()
        else:
            sequences = await self._threads.run_in_thread(request.owner, tokenize)
        sampling = msgspec.structs.replace(request.sampling, banned_sequences=sequences)
        return dataclasses.replace(request, sampling=sampling)

    async def _added(
        self,
        request: GenerationRequest,
        prompt: PreparedPrompt,
        max_tokens: int,
        grammar: str | None,
    ) -> AddRequest:
        return AddRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            images=[*await self._tiles(prompt.images, request)],
            spans=prompt.spans,
            sampling=request.sampling,
            max_tokens=max_tokens,
            # A grammar decides where an answer may end.
            eos_token_ids=[]
            if request.ignore_eos and not grammar
            else self._processor.eos_token_ids,
            stop_token_ids=list(request.stop_token_ids),
            tenant=request.tenant,
            owner=request.owner,
            policy=request.policy,
            adapter=request.adapter,
            choice_ids=[uuid.uuid4().hex for _ in range(1, request.num_choices)],
            priority=request.priority,
            num_prompt_logprobs=request.num_prompt_logprobs,
            grammar=grammar,
        )

    async def _grammar(self, request: GenerationRequest) -> str | None:
        """The request's grammar in the engine's form. Raises BadRequestError."""
        if request.grammar is None:
            return None
        current_record().ignored_fields += request.ignored_fields
        whose = (request.tenant, request.owner)
        check = self._grammar_checks.check
        try:
            return await check(request.grammar, request.grammar_field, *whose)
        except BadRequestError:
            # With several schemas, such as those of tools, name the wrong one.
            for grammar, field in request.grammar_parts:
                await check(grammar, field, *whose)
            raise

    async def _prompts(
        self, request: GenerationRequest, info: EngineReady
    ) -> Sequence[PreparedPrompt]:
        if request.messages:
            return [await self._conversation(request, info.max_model_len)]
        prepare = functools.partial(self._plain_prompts, request, info)
        if sum(len(prompt.content) for prompt in request.prompts) <= MAX_INLINE_CHARS:
            return prepare()
        return await self._threads.run_in_thread(request.owner, prepare)

    async def _conversation(self, request: GenerationRequest, max_model_len: int) -> PreparedPrompt:
        num_chars = sum(message.num_chars for message in request.messages)
        has_json = bool(request.tools) or any(one.tool_calls for one in request.messages)
        is_short = num_chars <= MAX_INLINE_CHARS and not has_json
        most = max_model_len - 1
        num_kept = cut_to(request, max_model_len)
        prepare = functools.partial(
            self._processor.prepare,
            request.messages,
            most if num_kept is None else max(MAX_PROMPT_TOKENS, most),
            request.tools,
            request.tool_format,
            request.template_options,
        )
        with prompt_errors(request.messages_field):
            if is_short and self._processor.renderer.is_quick:
                prompt = prepare()
            else:
                prompt = await self._threads.run_in_thread(request.owner, prepare)
        return self._cut(prompt, num_kept, most, request.messages_field)

    def _cut(
        self, prompt: PreparedPrompt, num_kept: int | None, most: int, field: str
    ) -> PreparedPrompt:
        """The end of the prompt. Raises BadRequestError if it lacks an image, or is too long."""
        num_cut = len(prompt.token_ids) - (num_kept or len(prompt.token_ids))
        if num_cut <= 0:
            return prompt
        if any(span.start < num_cut for span in prompt.spans):
            raise BadRequestError(
                f"truncate_prompt_tokens keeps {num_kept:,} of {len(prompt.token_ids):,} prompt"
                " tokens, without all images: raise it, or send fewer images",
                param="truncate_prompt_tokens",
            )
        token_ids = prompt.token_ids[num_cut:]
        if len(token_ids) > most:
            error = PromptTooLongError(f"{len(token_ids):,}", most)
            raise BadRequestError(str(error), param=field)
        spans = image_spans(token_ids, self._processor.image_id)
        return dataclasses.replace(prompt, token_ids=token_ids, spans=spans)

    def _plain_prompts(
        self, request: GenerationRequest, info: EngineReady
    ) -> Sequence[PreparedPrompt]:
        """Raises BadRequestError that names the first unusable prompt."""
        limit = max(MAX_PROMPT_TOKENS, info.max_model_len)
        prompts = []
        num_tokens = 0
        for prompt in request.prompts:
            token_ids = self._plain_prompt(prompt, request, info)
            num_tokens += len(token_ids)
            if num_tokens > limit:
                raise BadRequestError(
                    f"the prompts have over {limit:,} tokens together: send fewer in one request",
                    param=prompt.field,
                )
            whole = PreparedPrompt(token_ids, [], [])
            num_kept = cut_to(request, info.max_model_len)
            prompts.append(self._cut(whole, num_kept, info.max_model_len - 1, prompt.field))
        return prompts

    def _plain_prompt(
        self, prompt: PlainPrompt, request: GenerationRequest, info: EngineReady
    ) -> list[int]:
        field, most = prompt.field, info.max_model_len - 1
        if request.num_kept_tokens is not None:
            most = max(MAX_PROMPT_TOKENS, most)
        try:
            if isinstance(prompt.content, str):
                token_ids = self._processor.prepare_text(
                    prompt.content, most, add_special_tokens=request.add_special_tokens
                )
            else:
                token_ids = list(prompt.content)
                self._check_ids(token_ids, field, info)
                if len(token_ids) > most:
                    raise PromptTooLongError(f"{len(token_ids):,}", most)
        except PromptTooLongError as error:
            raise BadRequestError(f"{field}: {error}", param=field) from error
        if not token_ids:
            raise BadRequestError(f"{field} has no tokens: send at least one", param=field)
        return token_ids

    def _check_ids(self, token_ids: Sequence[int], field: str, info: EngineReady) -> None:
        check_token_ids(info, token_ids, field)
        if self._processor.image_id in token_ids:
            raise BadRequestError(
                f"{field} contains {self._processor.image_id}, the token of an image, without an"
                " image: send images to /v1/chat/completions",
                param=field,
            )

    async def _tiles(
        self, images: Sequence[ImagePart], request: GenerationRequest
    ) -> list[ImageTiles]:
        if not images:
            return []
        record = current_record()
        record.num_images += len(images)
        record.images_started = record.images_started or time.monotonic()
        wanted = [
            ImageRequest(image.url, image.max_tiles, request.tenant, request.owner)
            for image in images
        ]
        deadline = asyncio.get_running_loop().time() + self._image_deadline_s
        try:
            tiles = await self._images.load(wanted, deadline)
            record.image_digests += [one.content_hash.hex() for one in tiles]
            return tiles
        except ImageError as error:
            field = "messages" if error.index is None else images[error.index].field
            raise BadRequestError(f"{field}: {error.message}", param=field) from error
        except TimeoutError as error:
            # A slow image server is an ImageError: here the images waited for this server.
            raise DeadlineError(
                f"the images were not loaded within {self._image_deadline_s:g} s, because this"
                " server is busy: try again",
                retry_after_s=IMAGE_RETRY_S,
            ) from error
        except PoolClosed as error:
            raise NotReadyError("the server is stopping: try again", retry_after_s=1.0) from error
        finally:
            record.images_ended = time.monotonic()


def _with_seeds(request: GenerationRequest, added: Sequence[AddRequest]) -> tuple[AddRequest, ...]:
    """The same requests; without a seed of the client, each prompt gets its own seed."""
    if request.has_seed:
        return tuple(added)
    for one in added[1:]:
        one.sampling = msgspec.structs.replace(one.sampling, seed=secrets.randbits(63))
    return tuple(added)
