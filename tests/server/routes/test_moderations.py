"""POST /v1/moderations: a guard's verdicts in OpenAI's shape, and who may ask."""

import asyncio
import json
import math

import msgspec
import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    meta_like_tokenizer,
    write_checkpoint,
)
from support.template_corpus import GUARD_VISION

from vlmserve.router.messages import SequenceOutput

TOKENIZER = meta_like_tokenizer()
PATH = "/v1/moderations"
IMAGE = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
NAMES = ["Threats", "Fraud", "Private data"]


def verdict(text, unsafe=0.9):
    """A script that answers with `text`; the first letter's candidates have both words."""
    first = {"s": 1 - unsafe, "u": unsafe}

    def script(request):
        token_ids = TOKENIZER.encode(text, add_special_tokens=False).ids
        for number, token_id in enumerate([*token_ids, 128009], 1):
            letter = TOKENIZER.decode([token_id])
            share = first.get(letter, 1.0)
            ids = [TOKENIZER.token_to_id(one) for one in first] if letter in first else [token_id]
            shares = list(first.values()) if letter in first else [share]
            logprobs = {
                "logprob": math.log(share),
                "top_token_ids": ids,
                "top_logprobs": [math.log(one) for one in shares],
            }
            fields = {
                "request_id": "r",
                "token_ids": [token_id],
                "finish_reason": "stop" if number == len(token_ids) + 1 else None,
                "logprobs": [logprobs],
            }
            yield msgspec.convert(fields, SequenceOutput)

    return script


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("guard"), GUARD_VISION)


def ask(checkpoint, body, script=None, path=PATH, **settings):
    """The response, and the requests to the engine."""

    async def run():
        engine = ScriptedEngine(script or verdict("\n\nsafe", 0.1))
        async with client_of(checkpoint, engine, **settings) as client:
            response = await client.post(path, json=body)
        return response, engine.requests

    return asyncio.run(run())


def prompts_of(requests):
    return [TOKENIZER.decode(one.prompt_token_ids, skip_special_tokens=False) for one in requests]


def test_a_safe_text_has_a_result_with_every_category_of_the_policy(guard):
    response, requests = ask(guard, {"input": " How? "})
    answer = response.json()
    assert list(answer) == ["id", "model", "results"]
    assert answer["id"].startswith("modr-")
    assert answer["model"] == MODEL
    (result,) = answer["results"]
    assert result["flagged"] is False
    assert result["categories"] == dict.fromkeys(NAMES, False)
    assert result["category_scores"] == pytest.approx(dict.fromkeys(NAMES, 0.1))
    assert result["category_applied_input_types"] == {name: ["text"] for name in NAMES}
    (prompt,) = prompts_of(requests)
    assert "<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Threats." in prompt
    assert "User: How?\n\n<END CONVERSATION>" in prompt
    assert requests[0].sampling.temperature == 0


def test_the_categories_that_the_guard_names_are_flagged_with_its_probability(guard):
    response, _ = ask(guard, {"input": "How?"}, verdict("\n\nunsafe\nS1,S3", 0.8))
    (result,) = response.json()["results"]
    assert result["flagged"] is True
    assert result["categories"] == {"Threats": True, "Fraud": False, "Private data": True}
    assert result["category_scores"] == pytest.approx(
        {"Threats": 0.8, "Fraud": 0.0, "Private data": 0.8}
    )


def test_texts_have_a_result_each_and_parts_have_one(guard):
    response, requests = ask(guard, {"input": ["a", "b", "c"], "model": MODEL})
    assert len(response.json()["results"]) == len(requests) == 3
    assert sorted(prompt.count("User: b") for prompt in prompts_of(requests)) == [0, 0, 1]
    parts = [IMAGE, {"type": "text", "text": "What is it?"}]
    for given in (parts, parts[::-1]):
        response, requests = ask(guard, {"input": given})
        (result,) = response.json()["results"]
        assert result["category_applied_input_types"]["Fraud"] == ["text", "image"]
        assert "User: <|image|>What is it?" in prompts_of(requests)[0]
        assert len(requests[0].images) == 1
    response, _ = ask(guard, {"input": [IMAGE]})
    assert response.json()["results"][0]["category_applied_input_types"]["Fraud"] == ["image"]


def test_a_policy_of_the_client_names_the_categories(guard):
    variables = {"categories": {"A": "Puns.", "B": "Rhymes: all.", "C": "Puns."}}
    body = {"input": "How?", "chat_template_kwargs": variables}
    response, _ = ask(guard, body, verdict("unsafe\nB,X9"))
    (result,) = response.json()["results"]
    assert result["categories"] == {
        "A: Puns": False, "Rhymes: all": True, "C: Puns": False, "X9": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", {"type": "text", "text": "b"}]}, "input[0]"),
        ({"input": [{"type": "audio"}]}, "input[0].type"),
        ({"input": "a\0"}, "input"),
        ({"input": ["a"] * 33}, "input"),
        ({"input": [IMAGE, IMAGE]}, "input"),
        ({"input": "a", "chat_template_kwargs": {"messages": [1]}},
         "chat_template_kwargs.messages"),
    ],
)  # fmt: skip
def test_a_bad_input_is_a_400_that_names_it(guard, body, param):
    response, requests = ask(guard, body)
    assert error_of(response, 400)["param"] == param
    assert requests == []


def test_another_model_is_a_404_and_no_guard_a_400(guard, tmp_path):
    error_of(ask(guard, {"input": "a", "model": "omni-moderation-latest"})[0], 404)
    plain = write_checkpoint(tmp_path / "plain")
    error = error_of(ask(plain, {"input": "a"})[0], 400)
    assert "--task moderation" in error["message"]
    error_of(ask(guard, {"input": "a"}, task="generate")[0], 400)
    response, _ = ask(plain, {"input": "a"}, verdict("unsafe\nS1"), task="moderation")
    assert response.json()["results"][0]["categories"] == {"S1": True}


def test_an_answer_that_is_no_verdict_is_an_error_of_the_server(guard):
    error = error_of(ask(guard, {"input": "a"}, verdict("What is this?"))[0], 500)
    assert "neither safe nor unsafe" in error["message"]


def test_a_guard_is_never_asked_in_metas_format(guard):
    """It used to be, without its policy, and answered as if it had read it."""
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}]}
    for turns in ([system, user], [user, user], [{"role": "assistant", "content": "a"}]):
        body = {"model": MODEL, "messages": turns}
        response, requests = ask(guard, body, path="/v1/chat/completions")
        error = error_of(response, 400)
        assert "Roles must alternate" in error["message"]
        assert requests == []


@pytest.mark.parametrize("answer", [None, "Hi."])
def test_a_chat_with_a_guard_has_its_policy(guard, answer):
    turns = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    body = {"model": MODEL, "messages": turns, "chat_template_kwargs": {
        "excluded_category_keys": ["S2"]}}  # fmt: skip
    response, requests = ask(guard, body, path="/v1/chat/completions")
    assert response.json()["choices"][0]["message"]["content"].strip() == "safe"
    (prompt,) = prompts_of(requests)
    assert "S1: Threats.\nS3: Private data.\n<END" in prompt
    assert "User: <|image|>What is it?" in prompt
    assert ("'Agent' breaks" in prompt) == (answer is not None)
    assert json.dumps(prompt).count("Agent: Hi.") == (answer is not None)
