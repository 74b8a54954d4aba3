"""POST /v1/moderations: what a guard such as Llama Guard says of texts and images."""

from __future__ import annotations

import asyncio
import contextlib

from sanic import HTTPResponse, Request

from ...router.processes.tasks import run_together
from ..api.endpoint import GENERATION_REFUSALS, Reply, Routes
from ..api.services import check_model, json_response, prepare, services_of
from ..errors import BadRequestError
from ..generation.events import End, PromptLogprobs, TextDelta
from ..generation.request import GenerationRequest
from ..generation.token_text import TokenEntry
from ..schemas.moderation.requests import ModerationRequest, generations_of
from ..schemas.moderation.verdicts import (
    Moderation,
    ModerationResult,
    moderation_of,
    result_of,
    verdict_of,
)
from . import samples

ROUTES = Routes("moderations", "Moderations")

# Inputs of one request that the guard reads at once.
MAX_AT_ONCE = 4


@ROUTES.post(
    "/v1/moderations",
    body=ModerationRequest,
    examples={
        "text": {"input": "How do I sharpen a knife?"},
        "parts": {
            "input": [
                {"type": "text", "text": samples.QUESTION},
                {"type": "image_url", "image_url": {"url": samples.PICTURE}},
            ]
        },
    },
    replies=[
        Reply(
            type=Moderation,
            description="A result for each text, or one for a list of parts.",
            example=samples.MODERATION,
        )
    ],
    refusals=GENERATION_REFUSALS,
)
async def moderations(request: Request, body: ModerationRequest) -> HTTPResponse:
    """A guard's verdict on each input, by the categories of its own policy."""
    services = services_of(request)
    if body.model is not None:
        check_model(request, body.model)
    if not services.processor.renderer.is_guard:
        raise BadRequestError(
            "this server's model is no guard: start it with a Llama Guard checkpoint, or with"
            " --task moderation if the model is one",
            param="model",
        )
    places = asyncio.Semaphore(MAX_AT_ONCE)

    async def judge(generation: GenerationRequest) -> ModerationResult:
        async with places:
            return await _judged(request, generation)

    results = await run_together(judge(one) for one in generations_of(body))
    model = body.model or services.settings.model_name
    return json_response(moderation_of(model, results))


async def _judged(request: Request, generation: GenerationRequest) -> ModerationResult:
    services = services_of(request)
    prepared = await prepare(request, generation)
    text, entries = "", list[TokenEntry]()
    async with contextlib.aclosing(services.generator.stream(prepared)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                text += event.text
            if not isinstance(event, End | PromptLogprobs):
                entries += event.logprobs
    prompt = services.processor.text_of(prepared.prompts[0])
    return result_of(verdict_of(text, entries), prompt, generation.messages[0])
