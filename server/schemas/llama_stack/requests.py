"""Llama Stack's chat completion: the request of every client line since 0.0.25.

Owns the spellings of roles, contents and strategies, and how they become a
`GenerationRequest`. The lines differ in their answers by path only, so one
schema takes them all. Knows nothing of tokens or of the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from ....models.batch import SamplingParams
from ...errors import BadRequestError
from ...generation.request import GenerationRequest, sampling_params
from ...prompts.conversation import ImagePart, Message, Part, Role, TextPart, ToolFormat
from .. import rules
from ..decoding import ModelName, no_nul
from ..openai.chat_messages import MAX_PARTS, bounded, parts_of_text
from ..rules import absent, all_of, any_of, given, having, needs, one_given, only_one_given
from ..sampling import StopString
from ..structured import StackFormat, answer_form, stack_form
from .tools import (
    StackCalls,
    StackTools,
    ToolConfig,
    offered_tools,
    one_setting,
    stack_calls,
    stack_tools,
)

Temperature = Annotated[float, msgspec.Meta(ge=0.0, le=2.0)]
TopP = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]


class Url(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    uri: str


class ImageSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`{"uri"}` of the oldest line, `{"url": {"uri"}}` or `{"data": base64}` of the newest."""

    schema_rules: ClassVar[dict[str, Any]] = only_one_given("uri", "url", "data")

    uri: str | None = None
    url: Url | str | None = None
    data: str | None = None


_TYPE_OF_TEXT = {"properties": {"type": {"enum": ["text", None]}}}
_TYPE_OF_IMAGE = {"properties": {"type": {"enum": ["image", None]}}}


class ContentItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text or an image in any line's spelling; see `_item`."""

    schema_rules: ClassVar[dict[str, Any]] = any_of(
        all_of(given("text"), absent("image", "url", "data"), _TYPE_OF_TEXT),
        all_of(given("image"), absent("text", "url", "data"), _TYPE_OF_IMAGE),
        all_of(given("url"), absent("text", "image", "data"), having("type", {"const": "image"})),
        all_of(given("data"), absent("text", "image", "url"), having("type", {"const": "image"})),
    )

    type: Literal["text", "image"] | None = None
    text: str | None = None
    image: ImageSource | str | None = None
    url: Url | str | None = None
    data: str | None = None


Content = str | ContentItem | Annotated[list[str | ContentItem], msgspec.Meta(max_length=MAX_PARTS)]


class StackMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. ipython is the older name of the role tool: the result of a call.

    context: text behind a user's content, such as retrieved text.
    """

    schema_rules: ClassVar[dict[str, Any]] = all_of(
        needs("context", {"not": {"type": "null"}}, "role", {"const": "user"}),
        needs("tool_calls", {"type": "array", "minItems": 1}, "role", {"const": "assistant"}),
    )

    role: Literal["system", "user", "assistant", "ipython", "tool"]
    content: Content
    context: Content | None = None
    stop_reason: Literal["end_of_turn", "end_of_message", "out_of_tokens"] | None = None
    tool_calls: StackCalls | None = None
    # Meta's format has no ids: a result belongs to the call before it.
    call_id: str | None = None
    tool_name: str | None = None


class Strategy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The strategy of the /v1/ line."""

    type: Literal["greedy", "top_p", "top_k"]
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None


class StackSampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Without a strategy it is greedy; 0 and null leave a field unset."""

    strategy: Literal["greedy", "top_p", "top_k"] | Strategy | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    stop: Annotated[list[StopString], msgspec.Meta(max_length=16)] | None = None


class LogprobConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many candidates to report for each token; 0 and null: none."""

    top_k: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None


class StackChatRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body."""

    prose_rules: ClassVar[tuple[str, ...]] = (
        *rules.OF_CHATS,
        rules.ONE_MODEL,
        rules.ONE_SETTING,
        rules.USERS_PICTURES,
    )
    schema_rules: ClassVar[dict[str, Any]] = one_given("model", "model_id")

    messages: Annotated[list[StackMessage], msgspec.Meta(min_length=1, max_length=2048)]
    model: ModelName | None = None
    model_id: ModelName | None = None
    sampling_params: StackSampling | None = None
    stream: bool | None = None
    logprobs: LogprobConfig | None = None
    tools: StackTools | None = None
    tool_choice: str | None = None
    tool_prompt_format: ToolFormat | None = None
    tool_config: ToolConfig | None = None
    response_format: StackFormat | None = None


def stack_model(body: StackChatRequest) -> str:
    """The model's name under either key. Raises BadRequestError without one, or with two."""
    if body.model is not None and body.model_id is not None and body.model != body.model_id:
        raise BadRequestError("model and model_id differ: send one of them", param="model_id")
    name = body.model_id if body.model is None else body.model
    if name is None:
        raise BadRequestError("model_id is required (or model, its older name)", param="model_id")
    return name


def stack_generation(body: StackChatRequest) -> GenerationRequest:
    """What is to be generated for this body.

    Raises BadRequestError that names the field and the remedy.
    """
    messages = bounded(_message(turn, f"messages[{i}]") for i, turn in enumerate(body.messages))
    params = body.sampling_params or StackSampling()
    config = body.tool_config or ToolConfig()
    choice = one_setting(body.tool_choice, config.tool_choice, "tool_choice", "auto")
    one_setting(body.tool_prompt_format, config.tool_prompt_format, "tool_prompt_format", "json")
    tool_format = config.tool_prompt_format or body.tool_prompt_format or "json"
    tools = offered_tools(stack_tools(body.tools), choice)
    forms, field = stack_form(body.response_format), "tools[{}].parameters"
    form = answer_form(forms, tools, choice, tool_format=tool_format, schema_field=field)
    return GenerationRequest(
        is_streamed=bool(body.stream),
        messages=messages,
        tools=tools,
        grammar=form.grammar if form else None,
        grammar_field=form.field if form else "",
        grammar_parts=form.parts if form else (),
        ignored_fields=form.ignored if form else (),
        tool_format=tool_format,
        sampling=msgspec.structs.replace(
            _sampling(params),
            repetition_penalty=params.repetition_penalty or 1.0,
            num_logprobs=(body.logprobs and body.logprobs.top_k) or None,
        ),
        max_tokens=params.max_tokens or None,
        max_tokens_field="sampling_params.max_tokens",
        stop=tuple(no_nul(text, "sampling_params.stop") for text in params.stop or ()),
    )


def _sampling(params: StackSampling) -> SamplingParams:
    """The strategy in OpenAI's terms; the old lines keep its numbers beside it."""
    strategy = params.strategy
    if strategy is None or isinstance(strategy, str):
        strategy = Strategy(strategy or "greedy", params.temperature, params.top_p, params.top_k)
    if strategy.type == "greedy":
        return sampling_params(0.0, None, None, None)
    if strategy.type == "top_k":
        return sampling_params(strategy.temperature, None, strategy.top_k, None)
    # 0 is how the old clients write an unset top_p.
    return sampling_params(strategy.temperature, strategy.top_p or None, None, None)


def _message(turn: StackMessage, field: str) -> Message:
    if turn.context is not None and turn.role != "user":
        raise BadRequestError(
            f"{field}: only a user's message may have a context", param=f"{field}.context"
        )
    if turn.tool_calls and turn.role != "assistant":
        raise BadRequestError(
            f"{field}: only an assistant's message may have tool_calls", param=f"{field}.tool_calls"
        )
    calls = stack_calls(turn.tool_calls, f"{field}.tool_calls")
    parts = _parts(turn.content, turn.role, f"{field}.content")
    if turn.context is not None:
        # An empty line between them, as in Meta's own prompt code.
        parts += (TextPart("\n\n"), *_parts(turn.context, turn.role, f"{field}.context"))
    message = Message(_role(turn.role), parts, calls)
    if message.images and message.role != "user":
        raise BadRequestError(
            f"{field}: only a user's message may have an image", param=f"{field}.content"
        )
    return message


def _role(role: str) -> Role:
    if role in ("ipython", "tool"):
        return "tool"
    if role == "user":
        return "user"
    return "assistant" if role == "assistant" else "system"


def _parts(content: Content, role: str, field: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        text = no_nul(content, field)
        return parts_of_text(text, field) if role == "user" else (TextPart(text),)
    if isinstance(content, ContentItem):
        return (_item(content, field),)
    return tuple(_item(item, f"{field}[{i}]") for i, item in enumerate(content))


def _item(item: str | ContentItem, field: str) -> Part:
    """The part that an item stands for: exactly one of its spellings must be there."""
    if isinstance(item, str):
        return TextPart(no_nul(item, field))
    _one_of(field, text=item.text, image=item.image, url=item.url, data=item.data)
    if item.text is not None and item.type != "image":
        return TextPart(no_nul(item.text, f"{field}.text"))
    if isinstance(item.image, str) and item.type != "text":
        return ImagePart(item.image, f"{field}.image")
    if isinstance(item.image, ImageSource) and item.type != "text":
        return _image(item.image, f"{field}.image")
    if item.type == "image":
        return _image(ImageSource(url=item.url, data=item.data), field)
    raise BadRequestError(
        f'{field} is neither a text nor an image: send a string, {{"type":"text","text":...}} or'
        ' {"type":"image","image":{"url":{"uri":...}}}',
        param=field,
    )


def _one_of(field: str, **spellings: object) -> None:
    """Raises BadRequestError if an item has two contents, of which one would be lost."""
    given = [name for name, value in spellings.items() if value is not None]
    if len(given) > 1:
        raise BadRequestError(f"{field} has both {given[0]} and {given[1]}: send one", param=field)


def _image(source: ImageSource, field: str) -> ImagePart:
    _one_of(field, uri=source.uri, url=source.url, data=source.data)
    if source.uri is not None:
        return ImagePart(source.uri, f"{field}.uri")
    if isinstance(source.url, Url):
        return ImagePart(source.url.uri, f"{field}.url.uri")
    if source.url is not None:
        return ImagePart(source.url, f"{field}.url")
    if source.data is not None:
        # A wrong label is accepted: the bytes decide the image's format.
        return ImagePart(f"data:image/png;base64,{source.data}", f"{field}.data")
    raise BadRequestError(f"{field} has no uri, url or data: send one", param=field)
