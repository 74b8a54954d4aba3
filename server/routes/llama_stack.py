"""Llama Stack's chat completion under every path that its clients use."""

from __future__ import annotations

from dataclasses import replace

from sanic import Blueprint, HTTPResponse, Request

from ..schemas.llama_stack import StackChatRequest, stack_generation, stack_model
from ..schemas.llama_stack_answers import StackAnswers
from .services import check_model, json_response, read_body, services_of, tenant_of
from .streaming import send_stream

PREFIXES = ("", "/ls", "/experimental/ls")
OLD_PATHS = ("/inference/chat_completion", "/alpha/inference/chat-completion")
NEW_PATH = "/v1/inference/chat-completion"


def blueprint() -> Blueprint:
    """Nine routes: three paths under three prefixes. Only the path picks the style."""
    routes = Blueprint("llama_stack")
    for number, prefix in enumerate(PREFIXES):
        for path in OLD_PATHS:
            name = f"old{number}{path.replace('/', '_').replace('-', '_')}"
            routes.add_route(chat_completion_old, prefix + path, methods=["POST"], name=name)
        routes.add_route(
            chat_completion_new, prefix + NEW_PATH, methods=["POST"], name=f"new{number}"
        )
    return routes


async def chat_completion_old(request: Request) -> HTTPResponse | None:
    """One answer in the style of the clients before 0.1."""
    return await _complete(request, is_new=False)


async def chat_completion_new(request: Request) -> HTTPResponse | None:
    """One answer in the style of the clients from 0.1 on."""
    return await _complete(request, is_new=True)


async def _complete(request: Request, is_new: bool) -> HTTPResponse | None:
    body = read_body(request, StackChatRequest)
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
