"""The whole HTTP side of a server on the bundled checkpoint, its engine scripted.

Owns what is fuzzed: real schemas, prompts, grammars' checks and image decoders; answers that
end by every reason, with log-probabilities where asked for; one picture behind every URL.
"""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
from collections.abc import AsyncIterator, Iterator, Sequence

from support.http_side import MODEL, ScriptedEngine, running_server
from support.openapi_hooks import VOCAB_SIZE
from support.pictures import encoded, picture

from vlmserve.models.batch import PromptLogprobs, TokenLogprobs
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.router.messages import AddRequest, EngineReady, SequenceOutput
from vlmserve.server.routes import pages
from vlmserve.server.settings import ServerSettings

# No prompt that a fuzzer sends is too long for it.
CONTEXT = 2**40
KEY = "key-of-tests"
TOKENS = [300, 301, 302]
# "safe" and the end of the turn: the answer of a guard.
SAFE = [82, 64, 583, 761]
PICTURE = encoded(picture(8, 8))


class OnePicture:
    """A fetcher that has the same picture behind every URL."""

    async def fetch(self, source, spend=None, *_, **__) -> bytes:
        return PICTURE

    async def close(self) -> None:
        """Nothing is open."""


def answers(request: AddRequest, answer: Sequence[int] = TOKENS) -> Iterator[SequenceOutput]:
    """The tokens for each answer asked for; the last one ends by itself, others by length."""
    num_top = request.sampling.num_logprobs
    for choice, _ in enumerate(request.answer_ids):
        token_ids = answer[: max(1, min(request.max_tokens, len(answer)))]
        for place, token_id in enumerate(token_ids):
            is_last = place == len(token_ids) - 1
            yield SequenceOutput(
                request_id=str(choice),
                token_ids=[token_id],
                finish_reason=("length" if choice % 2 else "stop") if is_last else None,
                logprobs=[] if num_top is None else [_logprobs(num_top)],
                prompt_logprobs=_of_prompt(request) if choice == place == 0 else None,
            )


def _logprobs(num_top: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5, list(range(num_top)), [-1.0] * num_top)


def _of_prompt(request: AddRequest) -> list[PromptLogprobs | None] | None:
    num_top = request.num_prompt_logprobs
    if num_top is None:
        return None
    entry = PromptLogprobs(300, -0.5, 1, list(range(num_top)), [-1.0] * num_top)
    return [None, *([entry] * (len(request.prompt_token_ids) - 1))]


@contextlib.asynccontextmanager
async def fuzzed_server(*, is_ready: bool = True, **settings) -> AsyncIterator[str]:
    """Its base URL. is_ready: the engine has loaded its model."""
    is_guard = settings.get("task") == "moderation"
    engine = ScriptedEngine(functools.partial(answers, answer=SAFE) if is_guard else answers)
    engine.info = EngineReady(
        pid=1,
        max_model_len=CONTEXT,
        vocab_size=VOCAB_SIZE,
        max_num_seqs=128,
        device="cpu",
        dtype="float32",
        num_text_tokens=4096,
        num_image_tiles=64,
    )
    if not is_ready:
        engine.info, engine.is_ready = None, False
    fields = {"served_model_names": [MODEL]} | settings
    options = ServerSettings(model=str(CHECKPOINT), engine_socket="", **fields)
    with unittest.mock.patch.object(pages, "_seconds", two_seconds):
        async with running_server(options, engine_client=engine, fetcher=OnePicture()) as url:
            yield url


async def two_seconds(_: object) -> AsyncIterator[None]:
    """A live stream that ends without its reader."""
    for _second in range(2):
        yield
