"""`--speculative ngram` over a whole server: the same answers, and its metrics count drafts."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

MODEL = "vlmserve-tiny-vision"
SCHEMA = {
    "type": "array",
    "items": {"const": "the same words again and again"},
    "minItems": 3,
    "maxItems": 3,
}
# Few tokens to choose from, so that an answer repeats itself.
FEW = {str(token_id): 30 for token_id in range(90, 94)}
GREEDY = {"temperature": 0, "max_tokens": 60}
REQUESTS = [
    GREEDY | {"logit_bias": FEW},
    {"temperature": 0.8, "seed": 5, "max_tokens": 60, "logit_bias": FEW},
    {"temperature": 0.8, "seed": 6, "max_tokens": 60, "frequency_penalty": 0.1, "logit_bias": FEW},
    GREEDY | {"logprobs": True},
    {
        "temperature": 0,
        "max_tokens": 200,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    },
]
METRICS = ("drafted_rows", "draft_tokens", "accepted_draft_tokens")


def choice_of(server, picture, fields: dict) -> tuple[str, str, list[str]]:
    """An answer's text, its end, and its tokens if they were requested."""
    content = [
        {"type": "image_url", "image_url": {"url": picture.url}},
        {"type": "text", "text": "What is here? And here? And here? And here?"},
    ]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]} | fields
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        (choice,) = json.load(reply)["choices"]
    tokens = [one["token"] for one in (choice.get("logprobs") or {}).get("content") or []]
    return choice["message"]["content"], choice["finish_reason"], tokens


def counts_of(server) -> list[float]:
    """Rows with drafts, drafts, and accepted ones, of one moment."""
    lines = [line.split(" ") for line in server.get("/metrics").decode().splitlines()]
    found = {line[0]: float(line[1]) for line in lines if line[0].startswith("vlmserve_")}
    return [found[f"vlmserve_{name}_total"] for name in METRICS]


@pytest.mark.slow
def test_a_server_with_drafts_answers_as_the_server_without(
    server, start_server, draw_picture, wait_for
):
    picture = draw_picture(77)
    drafting = start_server("--dtype", "float32", "--speculative", "ngram")
    expected = [choice_of(server, picture, one) for one in REQUESTS]
    assert [choice_of(drafting, picture, one) for one in REQUESTS] == expected
    with ThreadPoolExecutor(len(REQUESTS)) as together:
        found = list(together.map(lambda one: choice_of(drafting, picture, one), REQUESTS))
    assert found == expected
    # the engine reports its counts now and then
    assert wait_for(lambda: counts_of(drafting)[2] > 5)
    rows, drafts, accepted = counts_of(drafting)
    assert rows <= drafts
    assert accepted < drafts
    assert counts_of(server) == [0, 0, 0]
