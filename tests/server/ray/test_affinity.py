"""What the router on Ray knows of a request's body: its picture, its prefix, its weight."""

import json

import pytest

from vlmserve.server.ray.affinity import Affinity, affinity_of

PIXELS = "iVBORw0KGgo" * 20
URL = f"data:image/png;base64,{PIXELS}"
KEY = b"Bearer one"
LONG = "What is in this picture? " * 40


def keys(key=KEY, **body):
    return affinity_of(json.dumps(body).encode(), key).keys


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


BODIES_WITH_THE_PICTURE = {
    "openai": {"messages": user({"type": "image_url", "image_url": {"url": URL}}, text("Hi"))},
    "openai, words first": {
        "messages": user(text(LONG), {"type": "image_url", "image_url": {"url": URL}})
    },
    "tag": {"messages": [{"role": "user", "content": f'What? <img src="{URL}" />'}]},
    "responses": {"input": user({"type": "input_image", "image_url": URL})},
    "anthropic": {
        "messages": user(
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": PIXELS},
            }
        )
    },
    "llama stack": {"messages": user({"type": "image", "image": {"url": {"uri": URL}}})},
}


@pytest.mark.parametrize("api", BODIES_WITH_THE_PICTURE)
def test_a_picture_has_the_same_key_in_every_api_and_behind_any_words(api):
    assert keys(**BODIES_WITH_THE_PICTURE[api]) == keys(**BODIES_WITH_THE_PICTURE["openai"])
    assert len(keys(**BODIES_WITH_THE_PICTURE[api])) == 1


def test_the_first_picture_counts_and_later_turns_keep_it():
    first = {"type": "image_url", "image_url": {"url": URL}}
    second = {"type": "image_url", "image_url": {"url": URL + "AAAA"}}
    later = [*user(first, text("Hi")), {"role": "assistant", "content": "A circle."}]
    assert keys(messages=later + user(second)) == keys(messages=user(first))
    assert keys(messages=user(second, first)) != keys(messages=user(first))


def test_tenants_do_not_share_keys():
    body = BODIES_WITH_THE_PICTURE["openai"]
    assert keys(b"Bearer two", **body) != keys(**body)
    assert not set(keys(b"Bearer two", prompt=LONG)) & set(keys(prompt=LONG))


def test_prompts_with_a_common_start_share_its_keys():
    one = keys(messages=[{"role": "system", "content": LONG}, *user(text("A" * 600))])
    other = keys(messages=[{"role": "system", "content": LONG}, *user(text("B" * 600))])
    assert one[-1] == other[-1]
    assert one[0] != other[0]
    assert keys(prompt="short") == ()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"7", b'"text"', b"\xff\xfe", b'{"messages": 7}', b'{"messages": [null]}',
     b'{"prompt": [[1, 2], [3]]}', b"[" * 5000, b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
     b'{"messages": [{"content": [{"type": "image_url"}]}]}', b'{"n": "many", "prompt": "x"}'],
)  # fmt: skip
def test_no_body_is_rejected_here(body):
    assert affinity_of(body, KEY).weight >= 1.0


def test_the_weight_is_of_the_answers_and_the_prompt():
    assert affinity_of(b'{"prompt": "hi"}', KEY).weight == pytest.approx(1.0, abs=0.01)
    assert affinity_of(b'{"prompt": "hi", "n": 4}', KEY).weight == pytest.approx(4.0, abs=0.01)
    long = json.dumps({"prompt": "a" * 4 * 512}).encode()
    assert affinity_of(long, KEY).weight == pytest.approx(2.0)


def test_a_response_that_is_continued_is_named():
    assert affinity_of(b'{"previous_response_id": "resp_1"}', KEY).earlier == "resp_1"
    assert affinity_of(b'{"previous_response_id": 7}', KEY).earlier is None
    assert Affinity().earlier is None


def test_requests_of_an_adapter_prefer_one_replica_and_share_no_prefix_with_others():
    def of(model, words=LONG):
        body = json.dumps({"model": model, "prompt": words}).encode()
        return affinity_of(body, KEY, frozenset({"french"})).keys

    assert of("french")[-1] == of("french", "another prompt")[-1]
    assert len(of("french", "short")) == 1
    assert of("base", "short") == ()
    assert set(of("french")).isdisjoint(of("base"))
