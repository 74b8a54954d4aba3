"""Streams byte for byte: the frames of `tests/data/*.stream.txt`, in their order."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from support.http_side import (
    ScriptedEngine,
    client_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

from vlmserve.router.errors import EngineDeadError

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENIZER = meta_like_tokenizer()
CHAT = "/v1/chat/completions"
OLD = ["/inference/chat_completion", "/alpha/inference/chat-completion"]
NEW = "/v1/inference/chat-completion"
STACK = [prefix + path for prefix in ("", "/ls", "/experimental/ls") for path in (*OLD, NEW)]


def whole(request):
    return list(tokens_one_by_one(TOKENIZER, "What is in"))


def broken(request):
    return [*tokens_one_by_one(TOKENIZER, "What", None), EngineDeadError("gone")]


def stream_of(checkpoint, path, script):
    """The stream that answers the documented request, its changing values made constant."""
    sample = "chat" if path == CHAT else "llama_stack"
    body = json.loads((DATA / f"{sample}.request.json").read_text()) | {"stream": True}
    if path == CHAT:
        body["stream_options"] = {"include_usage": True}

    async def run():
        async with client_of(checkpoint, ScriptedEngine(script)) as client:
            return await client.post(path, json=body)

    response = asyncio.run(run())
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    text = re.sub(r'"chat-[0-9a-f]{32}"', '"chat-ID"', response.text)
    return re.sub(r'"created":[0-9]{10},', '"created":CREATED,', text)


def documented(name):
    return (DATA / f"{name}.stream.txt").read_text()


def name_of(path):
    if path == CHAT:
        return "chat"
    return "llama_stack_v1" if path.endswith(NEW) else "llama_stack"


@pytest.mark.parametrize("path", [CHAT, *STACK])
def test_a_stream_is_the_documented_one_byte_for_byte(checkpoint, path):
    assert stream_of(checkpoint, path, whole) == documented(name_of(path))


@pytest.mark.parametrize("path", [CHAT, *STACK])
def test_a_stream_that_breaks_off_is_the_documented_one_byte_for_byte(checkpoint, path):
    assert stream_of(checkpoint, path, broken) == documented(f"{name_of(path)}.broken")
