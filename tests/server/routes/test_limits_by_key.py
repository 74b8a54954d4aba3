"""What a key of the file may do, over HTTP: its rates, its headers, its owner on every route."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from msgspec.structs import replace
from support.http_side import MODEL, ScriptedEngine, client_of, meta_like_tokenizer
from support.http_side import tokens_one_by_one as one_by_one
from support.invariants import CHAT, TEXT_ROUTES, body_for

from vlmserve.router.errors import TooManyRequestsError
from vlmserve.router.messages import OwnerPolicy

LINES = """\
plain
rated requests_per_minute=2 name=team-r
metered tokens_per_minute=40
shared weight=3 max_concurrent=3 cross_priority
"""
TOKENIZER = meta_like_tokenizer()


def body_of(path, **more):
    body = body_for(path, **more)
    return body | {name: MODEL for name in ("model", "model_id") if name in body}


def answer_of(request):
    """The same short answer for each choice, named by its number."""
    outputs = list(one_by_one(TOKENIZER, "What?"))
    for choice in range(len(request.answer_ids)):
        yield from (replace(output, request_id=str(choice)) for output in outputs)


@pytest.fixture
def served(checkpoint, tmp_path):
    file = tmp_path / "keys"
    file.write_text(LINES)

    def serve(use, script=answer_of, **settings):
        async def run():
            engine = ScriptedEngine(script)
            async with client_of(checkpoint, engine, api_key_file=str(file), **settings) as client:

                async def ask(key, path=CHAT, **more):
                    sent = {"Authorization": f"Bearer {key}"}
                    return await client.post(path, json=body_of(path, **more), headers=sent)

                return await use(ask), engine

        return asyncio.run(run())

    return serve


@pytest.mark.parametrize("path", TEXT_ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_row_71_a_key_beyond_its_rate_gets_429_with_openais_headers(served, path, stream):
    async def use(ask):
        rated = [await ask("rated", path, stream=stream) for _ in range(3)]
        return rated, await ask("plain", path, stream=stream)

    (rated, plain), engine = served(use)
    assert [answer.status_code for answer in rated] == [200, 200, 429]
    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in rated]
    assert remaining == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in rated} == {"2"}
    assert all(answer.headers["x-ratelimit-reset-requests"] for answer in rated)
    assert "x-ratelimit-limit-tokens" not in rated[0].headers
    refused = rated[-1].json()["error"]
    assert "team-r may send 2 requests a minute" in refused["message"]
    assert refused["code"] == "rate_limit_exceeded"
    assert 1 <= int(rated[-1].headers["retry-after"]) <= 30
    assert plain.status_code == 200
    assert not [name for name in plain.headers if name.startswith("x-ratelimit")]
    assert len(engine.requests) == 3


def test_tokens_of_prompts_and_of_answers_count(served):
    async def use(ask):
        answers = [await ask("metered") for _ in range(30)]
        return answers

    answers, engine = served(use)
    statuses = [answer.status_code for answer in answers]
    num_ok = statuses.count(200)
    assert statuses == [200] * num_ok + [429] * (30 - num_ok)
    usage = [answer.json()["usage"]["total_tokens"] for answer in answers[:num_ok]]
    assert sum(usage[:-1]) < 40 + 2 <= sum(usage) + 3, "a second may have filled it a little"
    assert answers[-1].headers["x-ratelimit-remaining-tokens"] == "0"
    assert len(engine.requests) == num_ok


@pytest.mark.parametrize("path", TEXT_ROUTES)
def test_the_owner_is_the_key_and_no_salt_changes_it(served, path):
    async def use(ask):
        salts = {"cache_salt": "s"} if path.endswith("/completions") else {}
        for key, more in (("plain", {}), ("plain", salts), ("shared", {})):
            assert (await ask(key, path, **more)).status_code == 200

    _, engine = served(use)
    first, salted, other = engine.requests
    assert first.owner == salted.owner != other.owner
    assert first.owner
    digest = hashlib.sha256(b"plain").hexdigest()
    assert digest not in (first.owner, first.tenant)
    assert first.policy == OwnerPolicy()
    assert other.policy == OwnerPolicy(weight=3.0, max_concurrent=3, cross_priority=True)


def test_more_answers_than_a_key_may_have_are_a_400_and_too_many_at_once_a_429(served):
    def full(request):
        return [TooManyRequestsError("this API key has 3 answers in progress")]

    async def use(ask):
        return await ask("shared", n=4), await ask("shared", n=3)

    (many, busy), engine = served(use, full)
    assert many.status_code == 400
    assert many.json()["error"]["param"] == "n"
    assert "may have 3 at once" in many.json()["error"]["message"]
    assert busy.status_code == 429
    assert busy.json()["error"]["code"] == "rate_limit_exceeded"
    assert busy.headers["retry-after"] == "1"
    assert len(engine.requests) == 1


@pytest.mark.parametrize(("settings", "limit"), [({}, 16), ({"max_answers_per_request": 5}, 5)])
def test_more_answers_than_a_request_may_have_are_a_400_that_names_the_option(
    served, settings, limit
):
    """One request of 64 answers took all 64 places."""

    async def use(ask):
        many = [await ask("plain", n=limit), await ask("plain", n=limit + 1)]
        prompts = ["a"] * (limit // 2 + 1)
        many.append(await ask("plain", "/v1/completions", prompt=prompts, n=2))
        return many

    (most, more, prompts), _ = served(use, **settings)
    assert most.status_code == 200, most.text
    for answer, param in ((more, "n"), (prompts, "prompt")):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        message = answer.json()["error"]["message"]
        assert "--max-answers-per-request" in message
        assert f"a request may ask for {limit}" in message
