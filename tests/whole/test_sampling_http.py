"""Sampling parameters over HTTP with the real server and the bundled model."""

import json
import math
import urllib.error
import urllib.request

import pytest

MODEL = "vlmserve-tiny-vision"


def user_message(text, url):
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def asked(draw_picture, **fields):
    picture = draw_picture(4242, num_shapes=1)
    return {
        "model": MODEL,
        "messages": [user_message("What is in this image?", picture.url)],
        "temperature": 0,
        "max_tokens": 40,
    } | fields


def test_logprobs_of_a_greedy_answer_name_its_tokens_as_the_likeliest(sdk, draw_picture):
    call = asked(draw_picture, logprobs=True, top_logprobs=3)
    answer = sdk.chat.completions.create(**call)
    (choice,) = answer.choices
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert b"".join(bytes(one.bytes or []) for one in content).decode() == choice.message.content
    assert content[-1].token == "<|eot_id|>"
    for one in content:
        assert one.top_logprobs[0].token == one.token
        values = [rival.logprob for rival in one.top_logprobs]
        assert values[0] == one.logprob
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0001
    chunks = list(sdk.chat.completions.create(**call, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in content]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content


def test_llama_stack_gives_the_same_logprobs(server, draw_picture):
    call = asked(draw_picture)
    body = {
        "model_id": MODEL,
        "messages": [{"role": "user", "content": "Who are you?"}],
        "sampling_params": {"max_tokens": 8},
        "logprobs": {"top_k": 2},
    }
    stack = post(server, "/v1/inference/chat-completion", body)
    chat_body = call | {"messages": body["messages"], "max_tokens": 8, "logprobs": True}
    chat = post(server, "/v1/chat/completions", chat_body)
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(stack["logprobs"]) == len(content)
    for by_token, one in zip(stack["logprobs"], content, strict=True):
        assert len(by_token["logprobs_by_token"]) == 2
        assert math.isclose(
            by_token["logprobs_by_token"][one["token"]], one["logprob"], abs_tol=1e-3
        )


def post(server, path, body):
    request = urllib.request.Request(
        server.url + path,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def test_a_bias_a_ban_and_min_tokens_reach_the_model(server, draw_picture):
    plain = post(server, "/v1/chat/completions", asked(draw_picture))
    num_tokens = plain["usage"]["completion_tokens"]
    assert plain["choices"][0]["finish_reason"] == "stop"
    longer = asked(draw_picture, min_tokens=num_tokens + 5)
    answer = post(server, "/v1/chat/completions", longer)
    assert answer["usage"]["completion_tokens"] > num_tokens + 4
    text = plain["choices"][0]["message"]["content"]
    assert answer["choices"][0]["message"]["content"].startswith(text)
    biased = asked(draw_picture, logit_bias={"0": 50})
    answer = post(server, "/v1/chat/completions", biased)
    assert answer["choices"][0]["message"]["content"] == "!" * 40
    penalized = biased | {"frequency_penalty": 2, "presence_penalty": 2}
    answer = post(server, "/v1/chat/completions", penalized)
    assert answer["choices"][0]["message"]["content"] != "!" * 40


def test_a_seed_repeats_itself_over_http_beside_other_requests(server, draw_picture):
    # Past the end of its turn the model is sure of nothing.
    call = asked(draw_picture, temperature=2, seed=7, min_tokens=30, max_tokens=30)
    first = post(server, "/v1/chat/completions", call)["choices"][0]["message"]["content"]
    assert first == post(server, "/v1/chat/completions", call)["choices"][0]["message"]["content"]
    others = {
        post(server, "/v1/chat/completions", call | {"seed": seed})["choices"][0]["message"][
            "content"
        ]
        for seed in range(8, 14)
    }
    assert others != {first}


def test_a_parameter_that_the_model_cannot_take_is_a_400_that_names_it(server, draw_picture):
    for fields in ({"logit_bias": {"5000": 1}}, {"min_tokens": 41}, {"top_logprobs": 2}):
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, "/v1/chat/completions", asked(draw_picture, **fields))
        assert caught.value.code == 400
        assert json.loads(caught.value.read())["error"]["param"] == next(iter(fields))


def test_prompt_logprobs_tell_of_every_token_but_the_picture_and_do_not_depend_on_caches(
    sdk, draw_picture
):
    call = asked(draw_picture, max_tokens=4, extra_body={"prompt_logprobs": 2})
    first, second = (sdk.chat.completions.create(**call) for _ in range(2))
    entries = first.prompt_logprobs
    assert len(entries) == first.usage.prompt_tokens
    assert sum(entry is None for entry in entries) == 2, "the first token and the picture"
    for entry in filter(None, entries):
        told = sorted(entry.values(), key=lambda one: one["rank"])
        assert 2 <= len(told) <= 3
        assert told[0]["rank"] == 1
        values = [one["logprob"] for one in told]
        assert values == sorted(values, reverse=True)
    assert second.usage.prompt_tokens_details is None, "nothing came from a cache"
    for entry, other in zip(entries, second.prompt_logprobs, strict=True):
        assert (entry is None) == (other is None)
        for token_id in set(entry or ()) & set(other or ()):
            assert math.isclose(
                entry[token_id]["logprob"], other[token_id]["logprob"], abs_tol=1e-3
            )
