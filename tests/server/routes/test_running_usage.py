"""stream_options.continuous_usage_stats, and stop strings that stay in the answer."""

import asyncio
import json

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    frames_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

TOKENIZER = meta_like_tokenizer()
TURN = {"role": "user", "content": "What"}
BODIES = {
    "/v1/chat/completions": {"model": MODEL, "messages": [TURN]},
    "/v1/completions": {"model": MODEL, "prompt": "What"},
}
TOOL = {"type": "function", "function": {"name": "f"}}


def sent(checkpoint, path, body, text):
    async def run():
        engine = ScriptedEngine(lambda request: tokens_one_by_one(TOKENIZER, text))
        async with client_of(checkpoint, engine) as client:
            return await client.post(path, json=BODIES[path] | body)

    return asyncio.run(run())


def chunks_of(response):
    *chunks, done = frames_of(response)
    assert done == "[DONE]"
    return list(map(json.loads, chunks))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("include_usage", [True, False])
def test_every_chunk_has_the_usage_so_far(checkpoint, path, include_usage):
    """guidellm reads the usage of every chunk, and used to get a 400."""
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    body = {"stream": True, "stream_options": options}
    frames = chunks_of(sent(checkpoint, path, body, "You are a helpful assistant."))
    usages = [frame["usage"] for frame in frames]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert len(set(counts)) > 4
    assert len({usage["prompt_tokens"] for usage in usages}) == 1
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)
    assert (frames[-1]["choices"] == []) is include_usage


def test_the_chunks_of_a_call_have_the_usage_too(checkpoint):
    options = {"continuous_usage_stats": True}
    body = {"stream": True, "stream_options": options, "tools": [TOOL]}
    text = '{"name": "f", "parameters": {"a": "assistant"}}'
    frames = chunks_of(sent(checkpoint, "/v1/chat/completions", body, text))
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts == sorted(counts)
    assert any(frame["choices"][0]["delta"].get("tool_calls") for frame in frames)
    assert counts[-1] > counts[0]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["no_stop_trim", "include_stop_str_in_output"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_stays_in_the_answer_where_asked(checkpoint, path, name, stream):
    body = {"stop": ["helpful"], name: True, "stream": stream}
    answer = sent(checkpoint, path, body, "You are a helpful assistant.")
    if stream:
        choices = [choice for frame in chunks_of(answer) for choice in frame["choices"]]
        texts = [choice.get("text") or choice.get("delta", {}).get("content") for choice in choices]
        text = "".join(filter(None, texts))
    else:
        (choice,) = answer.json()["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert choice["stop_reason"] == "helpful"
    assert text == "You are a helpful"
