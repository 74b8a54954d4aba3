"""Llama Stack's chat completion under every path that its clients use, and its models.

Models are listed under the prefixes only: without a prefix, the path is OpenAI's.
"""

from __future__ import annotations

from urllib.parse import unquote

from sanic import HTTPResponse, Request

from ..api.endpoint import EVENTS, GENERATION_REFUSALS, Reply, Routes
from ..api.services import (
    check_model,
    json_response,
    prepare,
    services_of,
)
from ..api.sse import send_stream
from ..api.whole_answer import send_whole
from ..schemas.llama_stack.answers import (
    NewStackChunk,
    OldStackChunk,
    OldStackModel,
    StackAnswers,
    StackCompletion,
    StackModel,
    StackModelList,
    old_stack_model_card,
    stack_model_card,
)
from ..schemas.llama_stack.requests import StackChatRequest, stack_generation, stack_model
from . import samples

PREFIXES = ("", "/ls", "/experimental/ls")
OLD_PATHS = ("/inference/chat_completion", "/alpha/inference/chat-completion")
NEW_PATH = "/v1/inference/chat-completion"
# What the clients before 0.1 ask.
OLD_MODEL_PATHS = tuple(
    f"{prefix}{path}" for prefix in PREFIXES for path in ("/models", "/alpha/models")
)
MODEL_PATHS = tuple(f"{prefix}/v1/models" for prefix in PREFIXES if prefix)

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
            " one complete. An error is a separate frame.",
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
    prepared = await prepare(request, stack_generation(body))
    answers = StackAnswers(is_new, has_tools=bool(body.tools))
    if body.stream:
        await send_stream(request, prepared, answers)
        return None
    return await send_whole(request, prepared, answers.plain, answers.new_log)


@ROUTES.get(
    *MODEL_PATHS,
    replies=[
        Reply(
            type=StackModelList, description="The model's names.", example=samples.STACK_MODEL_LIST
        )
    ],
)
async def stack_models(request: Request) -> HTTPResponse:
    """The model under each of its served names, in Llama Stack's form."""
    answer: StackModelList = {"data": [_card(request, name) for name in _names(request)]}
    return json_response(answer)


@ROUTES.get(
    *(f"{path}/<name:path>" for path in MODEL_PATHS),
    parameters={"name": "A served name; its slashes may be sent as they are or as %2F."},
    replies=[
        Reply(
            type=StackModel,
            description="The model.",
            example=samples.STACK_MODEL_LIST["data"][0],
        )
    ],
    refusals=[404],
)
async def stack_model_of(request: Request, name: str) -> HTTPResponse:
    """The model under one of its served names, in Llama Stack's form, else 404."""
    name = unquote(name)
    check_model(request, name)
    return json_response(_card(request, name))


@ROUTES.get(
    *(f"{path}/list" for path in OLD_MODEL_PATHS),
    replies=[
        Reply(
            type=list[OldStackModel],
            description="The model's names.",
            example=[samples.OLD_STACK_MODEL],
        )
    ],
)
async def old_stack_models(request: Request) -> HTTPResponse:
    """The model under each of its served names, for Llama Stack's clients before 0.1."""
    return json_response([_old_card(request, name) for name in _names(request)])


@ROUTES.get(
    *(f"{path}/get" for path in OLD_MODEL_PATHS),
    replies=[
        Reply(
            type=OldStackModel | None,
            description="The model; null if no model has this name.",
            example=samples.OLD_STACK_MODEL,
        )
    ],
)
async def old_stack_model_of(request: Request) -> HTTPResponse:
    """The model of one name, for Llama Stack's clients before 0.1. Query: identifier."""
    name = request.args.get("identifier", "")
    is_served = name in _names(request)
    return json_response(_old_card(request, name) if is_served else None)


def _names(request: Request) -> list[str]:
    """The names of the model, then those of its adapters."""
    services = services_of(request)
    adapters = [adapter.name for adapter in services.adapters.registry.all()]
    return [*services.settings.served_model_names, *adapters]


def _old_card(request: Request, name: str) -> OldStackModel:
    services = services_of(request)
    return old_stack_model_card(name, services.settings.model_name, services.max_model_len)


def _card(request: Request, name: str) -> StackModel:
    services = services_of(request)
    return stack_model_card(name, services.settings.model_name, services.max_model_len)
