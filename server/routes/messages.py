"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import functools

from sanic import HTTPResponse, Request

from ..api.endpoint import EVENTS, GENERATION_REFUSALS, Reply, Routes
from ..api.services import (
    check_model,
    json_response,
    owner_of,
    prepare,
    services_of,
)
from ..api.sse import send_stream
from ..api.whole_answer import send_whole
from ..generation.prompt_errors import prompt_errors
from ..schemas.anthropic.answers import (
    MessageAnswer,
    MessageAnswers,
    MessageEvent,
    TokenCount,
)
from ..schemas.anthropic.requests import (
    CountTokensRequest,
    MessagesRequest,
    conversation_of,
    messages_generation,
    offered_tools,
    template_options_of,
)
from ..schemas.openai.tokenization import MAX_TOKENS
from . import samples

ROUTES = Routes("messages", "Messages")


@ROUTES.post(
    "/v1/messages",
    body=MessagesRequest,
    examples={"picture": samples.MESSAGES_REQUEST, "tools": samples.MESSAGES_TOOLS_REQUEST},
    replies=[
        Reply(type=MessageAnswer, description="The whole answer.", example=samples.MESSAGE),
        Reply(
            type=MessageEvent,
            media_type=EVENTS,
            description="With stream: true, an event in each frame, named by its type."
            " An error is an event of type error.",
        ),
    ],
    refusals=GENERATION_REFUSALS,
)
async def messages(request: Request, body: MessagesRequest) -> HTTPResponse | None:
    """One answer to a conversation, in Anthropic's form."""
    check_model(request, body.model)
    prepared = await prepare(request, messages_generation(body))
    answers = MessageAnswers(body.model, prepared.num_prompt_tokens)
    if body.stream:
        await send_stream(request, prepared, answers)
        return None
    return await send_whole(request, prepared, answers.plain)


@ROUTES.post(
    "/v1/messages/count_tokens",
    body=CountTokensRequest,
    examples={"picture": samples.COUNT_TOKENS_REQUEST},
    replies=[
        Reply(type=TokenCount, description="The number of tokens.", example={"input_tokens": 17})
    ],
    refusals=[404],
)
async def count_tokens(request: Request, body: CountTokensRequest) -> HTTPResponse:
    """The tokens of a conversation, as /v1/messages would send it to the model."""
    check_model(request, body.model)
    messages = conversation_of(body)
    prepare = functools.partial(
        services_of(request).processor.prepare,
        messages,
        MAX_TOKENS,
        offered_tools(body),
        options=template_options_of(messages),
    )
    threads = services_of(request).threads
    with prompt_errors(limit=f"at most {MAX_TOKENS:,} are counted: shorten it"):
        prompt = await threads.run_in_thread(owner_of(request), prepare)
    count: TokenCount = {"input_tokens": len(prompt.token_ids)}
    return json_response(count)
