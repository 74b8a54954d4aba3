"""Llama Stack's chat completion under every path that its clients use."""

from __future__ import annotations

from dataclasses import replace

from sanic import HTTPResponse, Request

from ..schemas.llama_stack import StackChatRequest, stack_generation, stack_model
from ..schemas.llama_stack_answers import (
    NewStackChunk,
    OldStackChunk,
    StackAnswers,
    StackCompletion,
)
from . import samples
from .declared import EVENTS, GENERATION_REFUSALS, Reply, Routes
from .services import check_model, json_response, services_of, tenant_of
from .streaming import send_stream

PREFIXES = ("", "/ls", "/experimental/ls")
OLD_PATHS = ("/inference/chat_completion", "/alpha/inference/chat-completion")
NEW_PATH = "/v1/inference/chat-completion"

ROUTES = Routes("llama_stack", "Llama Stack")


def _replies(chunk: type) -> list[Reply]:
    return [
        Reply(
            type=StackCompletion, description="The whole answer.", example=samples.STACK_COMPLETION
        ),
        Reply(
            type=chunk,
            media_type=EVENTS,
            description="With stream: true, an event in each `data:` frame: one start, progress,"
            " one complete. An error in between is a frame of its own.",
        ),
    ]


@ROUTES.post(
    *(prefix + path for prefix in PREFIXES for path in OLD_PATHS),
    body=StackChatRequest,
    examples={"picture": samples.STACK_REQUEST, "streamed": samples.STREAMED_STACK_REQUEST},
    replies=_replies(OldStackChunk),
    refusals=GENERATION_REFUSALS,
)
async def chat_completion_old(request: Request, body: StackChatRequest) -> HTTPResponse | None:
    """One answer in the style of Llama Stack's clients before 0.1."""
    return await _complete(request, body, is_new=False)


@ROUTES.post(
    *(prefix + NEW_PATH for prefix in PREFIXES),
    body=StackChatRequest,
    examples={"picture": samples.STACK_REQUEST, "streamed": samples.STREAMED_STACK_REQUEST},
    replies=_replies(NewStackChunk),
    refusals=GENERATION_REFUSALS,
)
async def chat_completion_new(request: Request, body: StackChatRequest) -> HTTPResponse | None:
    """One answer in the style of Llama Stack's clients from 0.1 on."""
    return await _complete(request, body, is_new=True)


async def _complete(request: Request, body: StackChatRequest, is_new: bool) -> HTTPResponse | None:
    check_model(request, stack_model(body))
    generator = services_of(request).generator
    generation = replace(stack_generation(body), tenant=tenant_of(request))
    prepared = await generator.prepare(generation)
    answers = StackAnswers(is_new, has_tools=bool(body.tools))
    if body.stream:
        # Never [DONE]: every client of Llama Stack raises on it.
        await send_stream(request, prepared, answers, with_done=False)
        return None
    return json_response(answers.plain(await generator.answer(prepared)))
