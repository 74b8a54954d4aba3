"""What a client of /v1/responses reads: the response, its items, the events of a stream.

Owns the keys and their order. `response_answers.py` fills them.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponseCandidate(TypedDict):
    """A candidate token. bytes: empty for a special token."""

    token: str
    logprob: float
    bytes: list[int]


class ResponseLogprob(ResponseCandidate):
    """A token of the answer and the likeliest candidates at its position."""

    top_logprobs: list[ResponseCandidate]


class ResponsePart(TypedDict):
    """A text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ResponseLogprob]


class ResponseItem(TypedDict):
    """An item of the output: a message with role and content, or a function_call."""

    id: str
    type: Literal["message", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[list[ResponsePart]]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]


class CachedTokens(TypedDict):
    """Tokens of the input that came from the cache."""

    cached_tokens: int
    cache_write_tokens: int


class ReasoningTokens(TypedDict):
    """Always 0: this model does not reason."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens; the stopping token counts."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why the answer ended early."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class ResponseReasoning(TypedDict):
    """Always null: this model does not reason."""

    effort: None
    summary: None


class Response(TypedDict):
    """The response. Fields of the request come back; usage is null until it has ended."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: Literal[False]
    completed_at: int | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ResponseReasoning
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(TypedDict):
    """One event of a stream. Its type determines its keys."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: NotRequired[Response]
    output_index: NotRequired[int]
    item_id: NotRequired[str]
    content_index: NotRequired[int]
    item: NotRequired[ResponseItem]
    part: NotRequired[ResponsePart]
    delta: NotRequired[str]
    text: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]
    logprobs: NotRequired[list[ResponseLogprob]]


class DeletedResponse(TypedDict):
    """The answer to a deletion."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(TypedDict):
    """The items of a response's own input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
