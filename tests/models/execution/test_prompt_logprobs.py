"""Log-probabilities of a prompt's tokens: exact against the oracle, whatever chunks, caches and
preemptions did, and in the published form.

float32 on a CPU, within 2e-5 of the log-softmax of the oracle's logits (they are of order 1).
"""

from __future__ import annotations

import asyncio

import httpx2
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support.fake_runner import (
    FakeRunner,
    expected_prompt_logprobs,
    expected_token_ids,
    fake_image,
    fake_info,
)
from support.http_side import (
    MODEL,
    OneTileImages,
    ScriptedEngine,
    running_server,
    write_checkpoint,
)
from support.oracle import IMAGE_ID, PROMPTS, oracle_logits, runner
from support.stepped import SteppedEngine

from vlmserve.models.batch import (
    ImageSpan,
    PoolSizes,
    PromptLogprobs,
    PromptTargets,
    SamplingParams,
)
from vlmserve.models.sampling import logprobs
from vlmserve.router.messages import AddRequest, SequenceOutput
from vlmserve.server.settings import ServerSettings

TOLERANCE = 2e-5
IMAGE = fake_image("p", 2)
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What is this?"}]}
DEADLINE_S = 120.0


def true_request(name: str, num_top: int | None) -> AddRequest:
    prompt = PROMPTS[name]()
    return AddRequest(
        request_id=name,
        prompt_token_ids=prompt.token_ids,
        images=prompt.images,
        spans=prompt.spans,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=2,
        num_prompt_logprobs=num_top,
    )


def assert_as_oracle(request: AddRequest, entries: list) -> None:
    expected = oracle_logits("tiny", PROMPTS[request.request_id]()).log_softmax(-1)
    assert len(entries) == len(request.prompt_token_ids)
    assert entries[0] is None
    for place, token_id in enumerate(request.prompt_token_ids[1:], 1):
        entry, row = entries[place], expected[place - 1]
        if token_id == IMAGE_ID:
            assert entry is None
            continue
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        likelier = row > row[token_id] + TOLERANCE
        possible = row > row[token_id] - TOLERANCE
        assert int(likelier.sum()) + 1 <= entry.rank <= int(possible.sum())
        best = row.topk(request.num_prompt_logprobs).values
        np.testing.assert_allclose(entry.top_logprobs, best, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(row[entry.top_token_ids], best, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("budget", [3, 24, 200])
def test_every_prompt_in_any_chunks_equals_the_oracle(budget):
    engine = SteppedEngine(runner("tiny"), {"max_num_batched_tokens": budget})
    wanted = [
        true_request(name, top) for name, top in zip(PROMPTS, [0, 1, 5, 20, 2, 3, 4], strict=True)
    ]
    for request in wanted:
        engine.add(request)
    engine.run()
    for request in wanted:
        assert_as_oracle(request, engine.sequences[request.request_id].prompt_logprobs)
    engine.assert_all_free()


def test_rows_are_computed_some_at_a_time(monkeypatch):
    monkeypatch.setattr(logprobs, "PROMPT_ROWS", 3)
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(1))
    token_ids = [4, 0, 10, 11, 2, 2, 9, 1]  # 11 has no logit
    sizes = []

    def logits_of(rows):
        sizes.append(len(rows))
        return rows.clone()

    entries = logprobs.prompt_logprobs(logits, PromptTargets(0, token_ids, 2), logits_of)
    assert sizes == [3, 3, 2]
    expected = logits.log_softmax(-1)
    for row, token_id, entry in zip(expected, token_ids, entries, strict=True):
        if token_id == 11:
            assert entry is None
            continue
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-6)
        assert entry.rank == 1 + int((row > row[token_id]).sum())
        assert entry.top_token_ids == row.topk(2).indices.tolist()


def engine_of(num_text_blocks=32, **limits) -> SteppedEngine:
    info = fake_info(PoolSizes(num_text_blocks, 8, 4), 64)
    return SteppedEngine(FakeRunner(info), {"max_num_batched_tokens": 5} | limits)


def request_of(name="a", num_prompt=13, **fields) -> AddRequest:
    prompt = [*range(num_prompt)]
    prompt[3] = 1000  # as `<|image|>`, beyond the vocabulary
    fields = {
        "max_tokens": 4,
        "num_prompt_logprobs": 0,
        "sampling": SamplingParams(seed=3),
    } | fields
    return AddRequest(
        request_id=name,
        prompt_token_ids=prompt,
        images=[IMAGE],
        spans=[ImageSpan(3)],
        **fields,
    )


def assert_told(engine: SteppedEngine, request: AddRequest) -> None:
    sequence = engine.sequences[request.request_id]
    assert sequence.prompt_logprobs == expected_prompt_logprobs(request)
    assert engine.generated(request.request_id) == expected_token_ids(request)


@pytest.mark.parametrize("num_prompt", [4, 5, 8, 9, 13])
def test_a_cached_prefix_is_computed_again_and_kept_for_others(num_prompt):
    engine = engine_of()
    first = request_of("first", num_prompt, num_prompt_logprobs=None)
    second, third = request_of("second", num_prompt), replace(first, request_id="third")
    for request in (first, second, third):
        engine.add(request)
        engine.run()
    assert_told(engine, second)
    cached = [engine.sequences[name].num_cached_tokens for name in ("first", "second", "third")]
    assert cached == [0, 0, (num_prompt - 1) // 4 * 4]
    assert engine.sequences["first"].prompt_logprobs is None
    engine.assert_all_free()


@pytest.mark.parametrize("num_steps", range(1, 5))
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_preempted_request_tells_each_token_once(num_steps, prefix_cache):
    """Preempted by hand after so many chunks of its prompt, or of its answer."""
    engine = engine_of(prefix_cache=prefix_cache)
    request = request_of()
    engine.add(request)
    for _ in range(num_steps):
        engine.step()
    engine.scheduler._lifecycle.preempt(engine.sequences["a"])
    engine.run()
    assert_told(engine, request)
    engine.assert_all_free()


def test_many_on_a_tiny_pool_are_told_right():
    engine = engine_of(num_text_blocks=9, max_num_batched_tokens=16)
    wanted = [request_of(str(i), 5 + i, max_tokens=9, tenant=str(i)) for i in range(6)]
    for request in wanted:
        engine.add(request)
    engine.run()
    assert engine.scheduler.snapshot().num_preemptions > 0
    for request in wanted:
        assert_told(engine, request)
    engine.assert_all_free()


def test_several_answers_tell_of_their_prompt_once():
    engine = engine_of()
    request = request_of(choice_ids=["b", "c"])
    engine.add(request)
    engine.run()
    assert_told(engine, request)
    assert [engine.sequences[one].prompt_logprobs for one in ("b", "c")] == [None, None]
    engine.assert_all_free()


def test_an_abort_within_the_prompt_tells_nothing():
    engine = engine_of()
    engine.add(request_of())
    engine.step()
    engine.abort("a")
    assert engine.step() is False
    engine.assert_all_free()


# Over HTTP


def tells_of_its_prompt(request: AddRequest) -> list[SequenceOutput]:
    """Each token is second to token 304, "Ġin", and the last one has no logit."""
    prompt = [
        PromptLogprobs(token_id, -2.5, 2, [304, token_id], [-0.5, -2.5])
        for token_id in request.prompt_token_ids[1:-1]
    ]
    first = SequenceOutput(request_id="0", token_ids=[3923], prompt_logprobs=[None, *prompt, None])
    return [first, SequenceOutput(request_id="0", token_ids=[128009], finish_reason="stop")]


def post(tmp_path_factory, body):
    """One POST to a worker with a scripted engine: the answer's status and JSON, the engine."""
    engine = ScriptedEngine(tells_of_its_prompt)
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    settings = ServerSettings(model=str(folder), engine_socket="", served_model_names=[MODEL])

    async def run():
        async with (
            asyncio.timeout(DEADLINE_S),
            running_server(settings, engine_client=engine, images=OneTileImages()) as url,
            httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S) as client,
        ):
            return await client.post("/v1/chat/completions", json=body)

    response = asyncio.run(run())
    return response.status_code, response.json(), engine


def test_the_answer_holds_an_entry_for_each_token_of_the_prompt(tmp_path_factory):
    status, answer, engine = post(tmp_path_factory, BODY | {"prompt_logprobs": 2})
    assert status == 200
    (request,) = engine.requests
    assert request.num_prompt_logprobs == 2
    entries = answer["prompt_logprobs"]
    assert len(entries) == answer["usage"]["prompt_tokens"]
    assert entries[0] is entries[-1] is None
    for token_id, entry in zip(request.prompt_token_ids[1:-1], entries[1:-1], strict=True):
        assert entry[str(token_id)]["logprob"] == -2.5
        assert entry[str(token_id)]["rank"] == 2
        assert entry["304"] == {"logprob": -0.5, "rank": 1, "decoded_token": " in"}
    at = request.prompt_token_ids.index(3923)
    assert entries[at]["3923"]["decoded_token"] == "What"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt_logprobs": 21}, "<= 20"),
        ({"prompt_logprobs": 1, "stream": True}, "leave stream out"),
        (
            {"prompt_logprobs": 20, "messages": [{"role": "user", "content": "? " * 4000}]},
            "ask for fewer",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path_factory, fields, reason):
    status, answer, engine = post(tmp_path_factory, BODY | fields)
    assert status == 400
    assert answer["error"]["param"] == "prompt_logprobs"
    assert reason in answer["error"]["message"]
    assert engine.requests == []
