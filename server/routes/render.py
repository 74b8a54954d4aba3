"""POST .../render: the prompt that a request becomes, without an answer to it."""

from __future__ import annotations

from sanic import HTTPResponse, Request

from ...router.messages import AddRequest
from ..api.endpoint import GENERATION_REFUSALS, Reply, Routes
from ..api.services import check_model, json_response, owner_of, prepare, services_of
from ..generation.preparer import PreparedGeneration
from ..schemas.openai.chat import ChatCompletionRequest, chat_generation
from ..schemas.openai.completions import CompletionRequest, completion_generation
from ..schemas.service_answers import (
    RenderedFeatures,
    RenderedPrompt,
    Rendering,
    RenderingFormat,
)
from . import samples

ROUTES = Routes("render", "Tokens")

REPLIES = [
    Reply(
        type=Rendering,
        description="Each prompt's text and token ids, where its images stand, and its format.",
        example=samples.RENDERING,
    )
]


@ROUTES.post(
    "/v1/chat/completions/render",
    body=ChatCompletionRequest,
    examples={"picture": samples.CHAT_REQUEST},
    replies=REPLIES,
    refusals=GENERATION_REFUSALS,
)
async def render_chat(request: Request, body: ChatCompletionRequest) -> HTTPResponse:
    """The prompt of a chat completion. All checks of the request are made; nothing is generated."""
    check_model(request, body.model)
    prepared = await prepare(request, chat_generation(body), body.cache_salt)
    form: RenderingFormat = "chat_template" if prepared.meta_reason is None else "meta"
    return await _answer(request, prepared, body.model, form)


@ROUTES.post(
    "/v1/completions/render",
    body=CompletionRequest,
    examples={"text": {"model": samples.MODEL, "prompt": "The sky is"}},
    replies=REPLIES,
    refusals=GENERATION_REFUSALS,
)
async def render_completion(request: Request, body: CompletionRequest) -> HTTPResponse:
    """The prompts of a completion. All checks of the request are made; nothing is generated."""
    check_model(request, body.model)
    prepared = await prepare(request, completion_generation(body), body.cache_salt)
    return await _answer(request, prepared, body.model, "text")


async def _answer(
    request: Request, prepared: PreparedGeneration, model: str, form: RenderingFormat
) -> HTTPResponse:
    services = services_of(request)
    read = services.processor.text_of

    def texts() -> list[str]:
        return [read(token_ids, skip_special_tokens=False) for token_ids in prepared.prompts]

    all_texts = await services.threads.run_in_thread(owner_of(request), texts)
    renderer = services.processor.renderer
    is_template = form == "chat_template"
    answer: Rendering = {
        "object": "rendering",
        "model": model,
        "format": form,
        "reason": prepared.meta_reason,
        "chat_template": renderer.origin if is_template else None,
        "content_format": renderer.content_format if is_template else None,
        "token_ids": prepared.prompts[0],
        "features": _features(prepared.requests[0]),
        "prompts": [
            _prompt(one, text) for one, text in zip(prepared.requests, all_texts, strict=True)
        ],
    }
    return json_response(answer)


def _features(request: AddRequest) -> RenderedFeatures | None:
    if not request.images:
        return None
    return {
        "mm_hashes": {"image": [image.content_hash.hex() for image in request.images]},
        "mm_placeholders": {
            "image": [{"offset": span.start, "length": 1} for span in request.spans]
        },
    }


def _prompt(request: AddRequest, text: str) -> RenderedPrompt:
    return {
        "text": text,
        "token_ids": request.prompt_token_ids,
        "images": [
            {
                "position": span.start,
                "num_tokens": 1,
                "num_tiles": image.num_tiles,
                "digest": image.content_hash.hex(),
            }
            for span, image in zip(request.spans, request.images, strict=True)
        ],
    }
