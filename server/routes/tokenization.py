"""POST /tokenize and /detokenize, at the root and under /v1/.

They need no engine: each worker has a tokenizer.
"""

from __future__ import annotations

import functools

from sanic import HTTPResponse, Request

from ..api.endpoint import Reply, Routes
from ..api.services import check_model, json_response, owner_of, services_of
from ..errors import BadRequestError
from ..generation.prompt_errors import prompt_errors
from ..prompts.processor import Processor
from ..schemas.openai.tokenization import (
    MAX_TOKENS,
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    messages_of,
    offered_tools,
    options_of,
    prompt_of,
)

ROUTES = Routes("tokenization", "Tokens")


@ROUTES.post(
    "/tokenize",
    "/v1/tokenize",
    body=TokenizeRequest,
    examples={"prompt": {"prompt": "What is"}},
    replies=[
        Reply(
            type=Tokenized,
            description="The token ids.",
            example={
                "count": 3,
                "max_model_len": 131072,
                "tokens": [128000, 3923, 374],
                "token_strs": None,
            },
            links={
                "text": {
                    "operationId": "post_detokenize",
                    "description": "The text again, special tokens included.",
                    "requestBody": {"tokens": "$response.body#/tokens"},
                }
            },
        )
    ],
    refusals=[404],
)
async def tokenize(request: Request, body: TokenizeRequest) -> HTTPResponse:
    """The token ids of a text, or of a conversation as chat completions would send it."""
    services = services_of(request)
    if body.model is not None:
        check_model(request, body.model)
    encode = functools.partial(_token_ids, services.processor, body)
    field = "messages" if body.prompt is None else "prompt"
    with prompt_errors(field, f"at most {MAX_TOKENS:,} can be returned: shorten it"):
        token_ids = await services.threads.run_in_thread(owner_of(request), encode)
    names = None
    if body.return_token_strs:
        name_all = functools.partial(services.processor.names_of, token_ids)
        names = await services.threads.run_in_thread(owner_of(request), name_all)
    answer: Tokenized = {
        "count": len(token_ids),
        "max_model_len": services.max_model_len,
        "tokens": token_ids,
        "token_strs": names,
    }
    return json_response(answer)


@ROUTES.post(
    "/detokenize",
    "/v1/detokenize",
    body=DetokenizeRequest,
    examples={"tokens": {"tokens": [3923, 374]}},
    replies=[Reply(type=Detokenized, description="The text.", example={"prompt": "What is"})],
    refusals=[404],
)
async def detokenize(request: Request, body: DetokenizeRequest) -> HTTPResponse:
    """The text of token ids, with the names of special tokens."""
    services = services_of(request)
    if body.model is not None:
        check_model(request, body.model)
    processor = services.processor
    if max(body.tokens, default=0) > processor.last_token_id:
        raise BadRequestError(
            f"tokens contains {max(body.tokens)}; the vocabulary ends at {processor.last_token_id}",
            param="tokens",
        )
    read = functools.partial(processor.text_of, body.tokens, skip_special_tokens=False)
    text = await services.threads.run_in_thread(owner_of(request), read)
    answer: Detokenized = {"prompt": text}
    return json_response(answer)


def _token_ids(processor: Processor, body: TokenizeRequest) -> list[int]:
    """Raises the errors of `Processor.prepare`, or BadRequestError."""
    text = prompt_of(body)
    if text is not None:
        add_special_tokens = body.add_special_tokens is not False
        return processor.prepare_text(text, MAX_TOKENS, add_special_tokens=add_special_tokens)
    messages = messages_of(body)
    options = options_of(body, messages)
    return processor.prepare(messages, MAX_TOKENS, offered_tools(body), options=options).token_ids
