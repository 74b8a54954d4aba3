"""POST /v1/chat/completions, plain and streamed."""

from __future__ import annotations

from sanic import HTTPResponse, Request

from ..api.endpoint import EVENTS, GENERATION_REFUSALS, Reply, Routes
from ..api.services import check_model, prepare
from ..api.sse import send_stream
from ..api.whole_answer import send_whole
from ..schemas.openai.answer_frames import frames_of
from ..schemas.openai.chat import ChatCompletionRequest, chat_generation
from ..schemas.openai.chat_answers import ChatAnswers, ChatCompletion, ChatCompletionChunk
from . import samples

ROUTES = Routes("chat", "Chat")


@ROUTES.post(
    "/v1/chat/completions",
    "/v1/openai/v1/chat/completions",
    body=ChatCompletionRequest,
    examples={
        "picture": samples.CHAT_REQUEST,
        "streamed": samples.STREAMED_REQUEST,
        "tools": samples.TOOLS_REQUEST,
        "form": samples.FORM_REQUEST,
    },
    replies=[
        Reply(
            type=ChatCompletion, description="The whole answer.", example=samples.CHAT_COMPLETION
        ),
        Reply(
            type=ChatCompletionChunk,
            media_type=EVENTS,
            description="With stream: true, a chunk in each `data:` frame, then `data: [DONE]`."
            " An error is a separate frame.",
        ),
    ],
    refusals=GENERATION_REFUSALS,
)
async def chat_completions(request: Request, body: ChatCompletionRequest) -> HTTPResponse | None:
    """One answer to a conversation, in OpenAI's form."""
    check_model(request, body.model)
    prepared = await prepare(request, chat_generation(body), body.cache_salt)
    answers = ChatAnswers(
        **frames_of(body, prepared),
        num_choices=body.n or 1,
        has_tools=bool(body.tools),
        is_call=prepared.form == "tool_choice",
    )
    if body.stream:
        await send_stream(request, prepared, answers)
        return None
    return await send_whole(request, prepared, answers.plain, answers.new_log)
