"""POST /v1/completions, plain and streamed."""

from __future__ import annotations

from collections.abc import Sequence

from sanic import HTTPResponse, Request

from ..api.endpoint import EVENTS, GENERATION_REFUSALS, Reply, Routes
from ..api.services import check_model, owner_of, prepare, services_of
from ..api.sse import send_stream
from ..api.whole_answer import send_whole
from ..generation.request import GenerationRequest
from ..schemas.openai.answer_frames import frames_of
from ..schemas.openai.completion_answers import CompletionAnswers, CompletionChunk, TextCompletion
from ..schemas.openai.completions import CompletionRequest, completion_generation
from . import samples

ROUTES = Routes("completions", "Completions")


@ROUTES.post(
    "/v1/completions",
    "/v1/openai/v1/completions",
    body=CompletionRequest,
    examples={
        "text": {"model": samples.MODEL, "prompt": "The sky is", "max_tokens": 8},
        "token ids": {"model": samples.MODEL, "prompt": [128000, 3923, 374], "max_tokens": 8},
    },
    replies=[
        Reply(
            type=TextCompletion,
            description="The whole answers, prompt by prompt.",
            example=samples.TEXT_COMPLETION,
        ),
        Reply(
            type=CompletionChunk,
            media_type=EVENTS,
            description="With stream: true, a chunk in each `data:` frame, then `data: [DONE]`."
            " An error is a separate frame.",
        ),
    ],
    refusals=GENERATION_REFUSALS,
)
async def completions(request: Request, body: CompletionRequest) -> HTTPResponse | None:
    """Continuations of one or several texts, in OpenAI's format."""
    check_model(request, body.model)
    generation = completion_generation(body)
    prepared = await prepare(request, generation, body.cache_salt)
    answers = CompletionAnswers(
        **frames_of(body, prepared),
        num_answers=body.n or 1,
        echoes=await _echoes(request, generation, prepared.prompts) if body.echo else None,
        num_top=body.logprobs,
        num_prompt_top=body.prompt_logprobs,
        is_echo_only=body.is_echo_only,
    )
    if body.stream:
        await send_stream(request, prepared, answers)
        return None
    return await send_whole(request, prepared, answers.plain, answers.new_log)


async def _echoes(
    request: Request, generation: GenerationRequest, prompts: Sequence[list[int]]
) -> list[str]:
    """The prompts as texts: as they were sent, or as answers would read if they were cut."""
    services = services_of(request)
    skips = not generation.text.shows_special
    is_whole = generation.num_kept_tokens is None

    def texts() -> list[str]:
        return [
            sent.content
            if is_whole and isinstance(sent.content, str)
            else services.processor.text_of(token_ids, skip_special_tokens=skips)
            for sent, token_ids in zip(generation.prompts, prompts, strict=True)
        ]

    return await services.threads.run_in_thread(owner_of(request), texts)
