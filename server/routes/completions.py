"""POST /v1/completions, plain and streamed."""

from __future__ import annotations

from collections.abc import Sequence

from sanic import HTTPResponse, Request

from ..api.endpoint import EVENTS, GENERATION_REFUSALS, Reply, Routes
from ..api.services import check_model, owner_of, prepare, services_of
from ..api.sse import send_stream
from ..api.whole_answer import send_whole
from ..generation.request import PlainPrompt
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
            description="The whole answers: those to the first prompt, then those to the next.",
            example=samples.TEXT_COMPLETION,
        ),
        Reply(
            type=CompletionChunk,
            media_type=EVENTS,
            description="With stream: true, a chunk in each `data:` frame, then `data: [DONE]`."
            " An error in between is a frame of its own.",
        ),
    ],
    refusals=GENERATION_REFUSALS,
)
async def completions(request: Request, body: CompletionRequest) -> HTTPResponse | None:
    """The continuation of one text or of several, in OpenAI's form."""
    check_model(request, body.model)
    generation = completion_generation(body)
    prepared = await prepare(request, generation, body.cache_salt)
    answers = CompletionAnswers(
        **frames_of(body, prepared.num_prompt_tokens),
        num_answers=body.n or 1,
        echoes=await _echoes(request, generation.prompts) if body.echo else None,
        num_top=body.logprobs,
        num_prompt_top=body.prompt_logprobs,
        is_echo_only=body.is_echo_only,
    )
    if body.stream:
        await send_stream(request, prepared, answers)
        return None
    return await send_whole(request, prepared, answers.plain, answers.new_log)


async def _echoes(request: Request, prompts: Sequence[PlainPrompt]) -> list[str]:
    """The prompts as texts: as they were sent, or as answers would read."""
    services = services_of(request)
    processor = services.processor

    def texts() -> list[str]:
        return [
            one.content if isinstance(one.content, str) else processor.text_of(one.content)
            for one in prompts
        ]

    return await services.threads.run_in_thread(owner_of(request), texts)
