"""POST /v1/chat/completions, plain and streamed."""

from __future__ import annotations

from dataclasses import replace

from sanic import Blueprint, HTTPResponse, Request

from ..errors import BadRequestError
from ..schemas.chat import ChatCompletionRequest, chat_generation
from ..schemas.chat_answers import ChatAnswers
from .services import check_model, json_response, read_body, services_of, tenant_of
from .streaming import send_stream


def blueprint() -> Blueprint:
    """The chat route."""
    routes = Blueprint("chat")
    routes.add_route(chat_completions, "/v1/chat/completions", methods=["POST"])
    return routes


async def chat_completions(request: Request) -> HTTPResponse | None:
    """One answer to a conversation, in OpenAI's form."""
    body = read_body(request, ChatCompletionRequest)
    check_model(request, body.model)
    if body.stream_options is not None and not body.stream:
        raise BadRequestError("stream_options needs stream: true", param="stream_options")
    generator = services_of(request).generator
    tenant = tenant_of(request, body.cache_salt)
    prepared = await generator.prepare(replace(chat_generation(body), tenant=tenant))
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    answers = ChatAnswers(body.model, include_usage, body.n or 1, has_tools=bool(body.tools))
    if body.stream:
        await send_stream(request, prepared, answers, with_done=True)
        return None
    return json_response(answers.plain(await generator.answer(prepared)))
