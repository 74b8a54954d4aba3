"""What vLLM's clients ask about tokens: their ids, special ones as text, and cut prompts."""

import asyncio
import json
import threading

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    frames_of,
    meta_like_tokenizer,
    tokens_one_by_one,
)

from vlmserve.models.batch import TokenLogprobs
from vlmserve.router.messages import SequenceOutput
from vlmserve.server.prompts.processor import Processor

TOKENIZER = meta_like_tokenizer()
TURN = {"role": "user", "content": "What is in this image?"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES = {
    CHAT: {"model": MODEL, "messages": [TURN]},
    TEXT: {"model": MODEL, "prompt": "What is in this image?"},
}
ANSWER = "You are a helpful assistant."
EOM, EOT = 128008, 128009
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOL = {"type": "function", "function": {"name": "f"}}


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def ask(checkpoint, path, *bodies, script=None, **settings):
    """The answers to the bodies, and the requests that the engine got."""

    async def run():
        make = script or (lambda request: tokens_one_by_one(TOKENIZER, ANSWER))
        engine = ScriptedEngine(make, **settings)
        async with client_of(checkpoint, engine) as client:
            answers = [await client.post(path, json=BODIES[path] | body) for body in bodies]
        return answers, engine.requests

    return asyncio.run(run())


def chunks_of(response):
    *chunks, done = frames_of(response)
    assert done == "[DONE]"
    return list(map(json.loads, chunks))


def outputs(token_ids, reason="stop", stop_token_id=None):
    """One token a step, each with its log-probability."""
    for number, token_id in enumerate(token_ids, 1):
        is_last = number == len(token_ids)
        yield SequenceOutput(
            request_id="r",
            token_ids=[token_id],
            finish_reason=reason if is_last else None,
            stop_token_id=stop_token_id if is_last else None,
            logprobs=[TokenLogprobs(-0.5, [token_id], [-0.5])],
        )


def text_of(choice):
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_has_the_ids_of_its_tokens_and_of_its_prompt(checkpoint, path):
    (plain, without), requests = ask(checkpoint, path, {"return_token_ids": True}, {})
    (choice,) = plain.json()["choices"]
    assert choice["token_ids"] == [*ids_of(ANSWER), EOT]
    assert len(choice["token_ids"]) == plain.json()["usage"]["completion_tokens"]
    holder = plain.json() if path == CHAT else choice
    assert holder["prompt_token_ids"] == requests[0].prompt_token_ids
    assert "token_ids" not in without.text


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_has_each_token_once_and_the_prompt_first(checkpoint, path):
    body = {"return_token_ids": True, "stream": True, "n": 2}
    script = lambda request: [  # noqa: E731
        SequenceOutput(request_id=str(choice), token_ids=[token_id], finish_reason=reason)
        for choice in range(2)
        for token_id, reason in [(3923, None), (374, None), (EOT, "stop")]
    ]
    (answer,), requests = ask(checkpoint, path, body, script=script)
    ids = {0: [], 1: []}
    prompts = []
    for number, chunk in enumerate(chunks_of(answer)):
        for choice in chunk["choices"]:
            ids[choice["index"]] += choice["token_ids"]
            holder = chunk if path == CHAT else choice
            if "prompt_token_ids" in holder:
                prompts.append((number, holder["prompt_token_ids"]))
    assert ids == {0: [3923, 374, EOT], 1: [3923, 374, EOT]}
    prompt = requests[0].prompt_token_ids
    assert prompts[0] == (0, prompt)
    # Once in a chat, and once for each choice of a text.
    assert [ids for _, ids in prompts] == [prompt] * (1 if path == CHAT else 2)


def test_each_prompt_of_several_has_its_own_ids(checkpoint):
    body = {"prompt": ["What", "You are"], "return_token_ids": True}
    (answer,), requests = ask(checkpoint, TEXT, body)
    prompts = [choice["prompt_token_ids"] for choice in answer.json()["choices"]]
    assert prompts == [request.prompt_token_ids for request in requests]
    assert len(set(map(tuple, prompts))) == 2


def test_the_chunks_of_a_call_have_the_ids_of_its_tokens(checkpoint):
    text = '{"name": "f", "parameters": {"a": "assistant"}}'
    body = {"return_token_ids": True, "stream": True, "tools": [TOOL]}
    script = lambda request: tokens_one_by_one(TOKENIZER, text)  # noqa: E731
    (answer,), _ = ask(checkpoint, CHAT, body, script=script)
    choices = [choice for chunk in chunks_of(answer) for choice in chunk["choices"]]
    assert [id for choice in choices for id in choice["token_ids"]] == [*ids_of(text), EOT]
    assert any(choice["delta"].get("tool_calls") for choice in choices)


def test_a_stop_string_ends_the_ids_with_the_token_that_completes_it(checkpoint):
    (answer,), _ = ask(checkpoint, CHAT, {"return_token_ids": True, "stop": "helpful"})
    assert answer.json()["choices"][0]["token_ids"] == ids_of("You are a helpful")


def test_an_echo_without_an_answer_has_no_ids_of_one(checkpoint):
    body = {"echo": True, "max_tokens": 0, "return_token_ids": True}
    (answer,), requests = ask(checkpoint, TEXT, body)
    (choice,) = answer.json()["choices"]
    assert choice["token_ids"] == []
    assert choice["prompt_token_ids"] == requests[0].prompt_token_ids


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "What is"),
        ({"skip_special_tokens": True}, "What is"),
        ({"skip_special_tokens": False}, "What<|eom_id|> is"),
        (
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            "What<|eom_id|> is<|eot_id|>",
        ),
    ],
)
def test_special_tokens_are_text_where_asked(checkpoint, path, fields, expected, stream):
    script = lambda request: outputs([3923, EOM, 374, EOT])  # noqa: E731
    (answer,), _ = ask(checkpoint, path, fields | {"stream": stream}, script=script)
    if not stream:
        assert text_of(answer.json()["choices"][0]) == expected
        return
    choices = [choice for chunk in chunks_of(answer) for choice in chunk["choices"]]
    texts = [choice.get("text") or choice.get("delta", {}).get("content") for choice in choices]
    assert "".join(filter(None, texts)) == expected


def test_special_tokens_that_are_text_have_bytes_and_a_place(checkpoint):
    """The bytes of all tokens joined are the answer, as without special tokens."""
    script = lambda request: outputs([3923, EOM, 374], "length")  # noqa: E731
    fields = {"skip_special_tokens": False, "logprobs": True, "top_logprobs": 1}
    (answer,), _ = ask(checkpoint, CHAT, fields, script=script)
    (choice,) = answer.json()["choices"]
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == text_of(choice)
    (answer,), _ = ask(
        checkpoint, TEXT, fields | {"logprobs": 1, "top_logprobs": None}, script=script
    )
    assert answer.json()["choices"][0]["logprobs"]["text_offset"] == [0, 4, 14]


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_a_stop_token_is_text_where_stop_strings_are(checkpoint, name):
    script = lambda request: outputs([3923, 374], "stop", 374)  # noqa: E731
    bodies = ({"stop_token_ids": [374], "return_token_ids": True, name: on} for on in (True, False))
    (kept, cut), _ = ask(checkpoint, CHAT, *bodies, script=script)
    assert text_of(kept.json()["choices"][0]) == "What is"
    assert text_of(cut.json()["choices"][0]) == "What"
    for answer in (kept, cut):
        assert answer.json()["choices"][0]["stop_reason"] == 374
        assert answer.json()["choices"][0]["token_ids"] == [3923, 374]
        assert answer.json()["usage"]["completion_tokens"] == 2


def test_log_probabilities_name_tokens_by_their_ids_where_asked(checkpoint):
    script = lambda request: outputs([3923, EOT])  # noqa: E731
    fields = {"return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": 1}
    (named, plain), _ = ask(
        checkpoint, CHAT, fields, fields | {"return_tokens_as_token_ids": False}, script=script
    )
    first, last = named.json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], last["token"]) == ("token_id:3923", f"token_id:{EOT}")
    assert first["top_logprobs"][0]["token"] == "token_id:3923"
    assert bytes(first["bytes"]) == b"What"
    assert plain.json()["choices"][0]["logprobs"]["content"][0]["token"] == "What"
    body = {"return_tokens_as_token_ids": True, "logprobs": 1}
    (answer,), _ = ask(checkpoint, TEXT, body, script=script)
    assert answer.json()["choices"][0]["logprobs"]["tokens"] == ["token_id:3923", f"token_id:{EOT}"]


@pytest.mark.parametrize("path", BODIES)
def test_a_cut_prompt_keeps_its_last_tokens(checkpoint, path):
    bodies = [{"truncate_prompt_tokens": number} for number in (0, 3, 10_000)]
    (whole, cut, _), requests = ask(checkpoint, path, *bodies)
    prompts = [request.prompt_token_ids for request in requests]
    assert prompts[0] == prompts[2]
    assert prompts[1] == prompts[0][-3:]
    assert cut.json()["usage"]["prompt_tokens"] == 3 < whole.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", BODIES)
def test_a_prompt_longer_than_the_context_is_served_if_it_is_cut(checkpoint, path):
    long = "What is in this image?" * 10
    body = {"messages": [TURN | {"content": long}]} if path == CHAT else {"prompt": long}
    bodies = [
        body | fields | {"max_tokens": 8}
        for fields in (
            {"truncate_prompt_tokens": -1},
            {"truncate_prompt_tokens": 12},
            {},
            {"truncate_prompt_tokens": 40},
        )
    ]
    answers, requests = ask(checkpoint, path, *bodies, max_model_len=32)
    assert [len(request.prompt_token_ids) for request in requests] == [24, 12]
    for answer in answers[2:]:
        assert "max_model_len" in error_of(answer, 400)["message"]


def test_an_echo_of_a_cut_prompt_is_what_was_read(checkpoint):
    body = {"echo": True, "truncate_prompt_tokens": 2}
    (answer,), _ = ask(checkpoint, TEXT, body)
    assert answer.json()["choices"][0]["text"] == " image?" + ANSWER


def test_a_cut_does_not_take_an_image_away(checkpoint):
    turn = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]}
    body = {"messages": [turn]}
    (whole, kept, torn), requests = ask(
        checkpoint,
        CHAT,
        body,
        body | {"truncate_prompt_tokens": 12},
        body | {"truncate_prompt_tokens": 4},
    )
    assert whole.status_code == kept.status_code == 200
    assert torn.status_code == 400
    error = error_of(torn, 400)
    assert error["param"] == "truncate_prompt_tokens"
    assert "without all images" in error["message"]
    first, second = requests
    num_cut = len(first.prompt_token_ids) - len(second.prompt_token_ids)
    assert num_cut > 0
    (whole_span,), (kept_span,) = first.spans, second.spans
    assert kept_span.start == whole_span.start - num_cut
    assert second.prompt_token_ids[kept_span.start] == 128256
    assert len(second.images) == 1


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_timings_come_once_and_only_where_they_are_requested(checkpoint, path, stream):
    def script(request):
        yield SequenceOutput(request_id="r", token_ids=[3923], queue_s=0.25, vision_s=0.125)
        yield SequenceOutput(request_id="r", token_ids=[EOT], finish_reason="stop")

    bodies = [{"stream": stream, "return_timings": True}, {"stream": stream}]
    (answer, without), _ = ask(checkpoint, path, *bodies, script=script)
    parts = chunks_of(answer) if stream else [answer.json()]
    (timings,) = [part["timings"] for part in parts if "timings" in part]
    assert (timings["queue_s"], timings["vision_s"], timings["images"]) == (0.25, 0.125, [])
    assert 0 <= timings["decode_s"] <= timings["total_s"]
    assert timings["ttft_s"] <= timings["total_s"]
    assert parts[-1]["timings"] is timings
    assert "timings" not in without.text


def test_timings_have_the_tiles_of_each_image(checkpoint):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    turn = {"role": "user", "content": [picture, {"type": "text", "text": "What"}]}
    body = {"messages": [turn], "return_timings": True}
    (answer,), requests = ask(checkpoint, CHAT, body)
    (image,) = requests[0].images
    seen = {name: getattr(image, name) for name in ("num_tiles", "tile_size", "aspect_ratio_id")}
    assert answer.json()["timings"]["images"] == [seen]


@pytest.mark.parametrize("path", BODIES)
def test_sglang_s_clients_get_the_ids_of_the_prompt_in_each_choice(checkpoint, path):
    body = {"return_prompt_token_ids": True}
    (plain, streamed), requests = ask(checkpoint, path, body, body | {"stream": True})
    (choice,) = plain.json()["choices"]
    assert choice["prompt_token_ids"] == requests[0].prompt_token_ids
    assert "token_ids" not in choice
    first, *others = chunks_of(streamed)
    assert first["choices"][0]["prompt_token_ids"] == requests[0].prompt_token_ids
    choices = [one for chunk in others for one in chunk["choices"]]
    assert not any({"prompt_token_ids", "token_ids"} & one.keys() for one in choices)


@pytest.mark.parametrize("path", BODIES)
def test_allowed_tokens_and_bad_words_reach_the_engine(checkpoint, path):
    body = {"allowed_token_ids": [3, 3, 5], "bad_words": ["image", " image", "helpful assistant"]}
    (answer,), requests = ask(checkpoint, path, body)
    assert "x-ignored-fields" not in answer.headers
    sampling = requests[0].sampling
    assert sampling.allowed_token_ids == (3, 5)
    # Each word as it is at the start of an answer, and as it is within a text.
    words = ("image", " image", "helpful assistant", " helpful assistant")
    assert sampling.banned_sequences == tuple(tuple(ids_of(word)) for word in words)
    assert all(map(len, sampling.banned_sequences))


def test_many_bad_words_are_tokenized_beside_the_event_loop(checkpoint, monkeypatch):
    threads = []

    def tokens_of(self, text):
        threads.append(threading.current_thread() is threading.main_thread())
        return [1, 2]

    monkeypatch.setattr(Processor, "tokens_of", tokens_of)
    ask(checkpoint, CHAT, {"bad_words": ["a" * 256] * 128}, {"bad_words": ["a", "b"]})
    assert threads == [False] * 256 + [True] * 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"allowed_token_ids": [128_264]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["a\0"]}, "bad_words[0]"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
    ],
)
def test_words_and_tokens_out_of_bounds_are_refused(checkpoint, body, param):
    (answer,), requests = ask(checkpoint, CHAT, body)
    assert error_of(answer, 400)["param"] == param
    assert requests == []


@pytest.mark.parametrize("path", BODIES)
def test_no_word_and_no_token_change_nothing(checkpoint, path):
    empty = {"allowed_token_ids": [], "bad_words": [], "return_prompt_token_ids": False}
    (answer, _), requests = ask(checkpoint, path, empty | {"seed": 1}, {"seed": 1})
    assert "x-ignored-fields" not in answer.headers
    assert requests[0].sampling == requests[1].sampling
