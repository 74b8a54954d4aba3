"""A row with drafts samples what rows of one token sample one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.oracle import PROMPTS, Blocks, Request, join, runner, schedule
from support.stepped import SteppedEngine

from vlmserve.models import bundled
from vlmserve.models.batch import SamplingParams, StepResult
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.grammar import Grammars
from vlmserve.models.sampling.verification import drafts_of
from vlmserve.router.messages import AddRequest

NUM_TOKENS = 6
CHOICES = {
    "greedy": SamplingParams(temperature=0.0, num_logprobs=2),
    "seeded": SamplingParams(temperature=1.5, seed=7, num_logprobs=2),
    "cut": SamplingParams(temperature=1.5, seed=8, top_k=40, top_p=0.9),
}


def started(model: ModelRunner, name: str, sampling: SamplingParams) -> tuple[Request, Blocks]:
    """A request whose prompt is computed and whose first token is known."""
    request, blocks = PROMPTS[name](), Blocks(model.info.pools)
    request.sampling = sampling
    result = model.execute(schedule(request, len(request.token_ids), blocks))
    request.token_ids.append(result.token_ids[name])
    return request, blocks


def one_by_one(name: str, sampling: SamplingParams) -> tuple[list[int], list[object]]:
    """The tokens behind the first, and their log-probabilities."""
    model = runner("tiny")
    request, blocks = started(model, name, sampling)
    logprobs = []
    for _ in range(NUM_TOKENS):
        result = model.execute(schedule(request, 1, blocks))
        request.token_ids.append(result.token_ids[name])
        logprobs.append(result.logprobs.get(name))
    return request.generated[1:], logprobs


def with_drafts(name: str, sampling: SamplingParams, drafts: list[int]) -> StepResult:
    """One step with these drafts behind the first token, beside another row."""
    model = runner("tiny")
    request, blocks = started(model, name, sampling)
    index = len(request.generated)
    request.token_ids += drafts
    batch = schedule(request, 1 + len(drafts), blocks)
    batch.sequences[0].num_drafts, batch.sequences[0].sample_index = len(drafts), index
    other = PROMPTS["short"]()
    beside = schedule(other, len(other.token_ids), blocks)
    result = model.execute(join([batch, beside]))
    assert result.token_ids.keys() == {name, "short"}
    return result


@pytest.mark.parametrize("name", ["text", "one", "apart"])
@pytest.mark.parametrize("choice", CHOICES)
def test_right_drafts_give_all_tokens_at_once(name: str, choice: str) -> None:
    expected, logprobs = one_by_one(name, CHOICES[choice])
    result = with_drafts(name, CHOICES[choice], expected[:-1])
    accepted = result.accepted[name]
    assert [result.token_ids[name], *accepted.token_ids] == expected
    if CHOICES[choice].num_logprobs is not None:
        found = [result.logprobs[name], *accepted.logprobs]
        for one, known in zip(found, logprobs, strict=True):
            assert one.logprob == pytest.approx(known.logprob, abs=1e-5)
            assert one.top_token_ids == known.top_token_ids


@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_drafts_behind_a_wrong_one_do_not_count(num_right: int) -> None:
    expected, _ = one_by_one("late", CHOICES["seeded"])
    drafts = list(expected[:-1])
    drafts[num_right] = (drafts[num_right] + 1) % 700
    result = with_drafts("late", CHOICES["seeded"], drafts)
    found = result.accepted["late"].token_ids if num_right else []
    assert [result.token_ids["late"], *found] == expected[: num_right + 1]
    assert ("late" in result.accepted) == (num_right > 0)


def test_a_grammar_s_masks_behind_drafts_are_those_after_them() -> None:
    grammars = Grammars(bundled.CHECKPOINT, 768)
    matcher = grammars.compile('{"grammars": [{"json_schema": {"const": "the same words"}}]}')
    forced = matcher.forced()
    assert matcher.num_allowed([*forced, 700]) == len(forced) > 1
    masks = grammars.fill([matcher, matcher.copy()], [forced, []])
    one = matcher.copy()
    for place, token_id in enumerate([*forced, 0]):
        assert (masks[place] == grammars.fill([one])[0]).all()
        if token_id:
            one.accept(token_id)
    assert (masks[-1] == grammars.fill([matcher])[0]).all(), "the matcher moved"


def test_the_drafts_are_a_row_s_last_tokens() -> None:
    model = runner("tiny")
    request = PROMPTS["text"]()
    row = schedule(request, 5, Blocks(model.info.pools)).sequences[0]
    assert drafts_of(row) == []
    assert drafts_of(replace(row, num_drafts=2)) == request.token_ids[3:5]


FEW = tuple(range(90, 96))
WISHES = [
    SamplingParams(temperature=0.0, allowed_token_ids=FEW),
    SamplingParams(temperature=0.7, seed=1, allowed_token_ids=FEW),
    SamplingParams(temperature=0.0, frequency_penalty=0.05, allowed_token_ids=FEW),
    SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.1, top_k=3),
    SamplingParams(
        temperature=0.0, allowed_token_ids=FEW, banned_sequences=((91, 92), (90, 90, 90))
    ),
    SamplingParams(seed=2, top_p=0.9, logit_bias=((90, 6.0), (91, 6.0)), min_tokens=9),
]
GRAMMAR = '{"grammars": [{"json_schema": {"type": "array", "items": {"const": "the same"}}}]}'


def answers_with(num_drafts: int, num_text_blocks: int) -> tuple[dict[str, list[int]], int]:
    """The answers to all wishes together and how many drafts were right."""
    model = runner("tiny", num_text_blocks)
    model.grammars = Grammars(bundled.CHECKPOINT, model.info.vocab_size)
    limits = {"num_speculative_tokens": num_drafts, "max_num_batched_tokens": 24}
    engine = SteppedEngine(model, limits)
    for number, sampling in enumerate([*WISHES, SamplingParams(temperature=0.0)]):
        request = AddRequest(
            request_id=str(number),
            prompt_token_ids=[90, 91, 92] * 4,
            sampling=sampling,
            max_tokens=30,
            stop_token_ids=[90] if sampling.min_tokens else [],
            grammar=GRAMMAR if number == len(WISHES) else None,
        )
        engine.add(request)
        if request.grammar is not None:
            matcher = model.compile_grammar(GRAMMAR, [])
            engine.scheduler.make_ready(engine.sequences[request.request_id], matcher)
    engine.run()
    engine.assert_all_free()
    assert (engine.scheduler.snapshot().num_preemptions > 0) == (num_text_blocks < 100)
    answers = {name: engine.generated(name) for name in engine.sequences}
    return answers, engine.scheduler.counts().drafts.num_accepted


def test_answers_with_drafts_are_those_without_in_any_company() -> None:
    expected, num_right = answers_with(0, 200)
    assert num_right == 0
    assert len(expected["5"]) < 30, "no answer ends at a stop token"
    for num_text_blocks in (200, 14):
        answers, num_right = answers_with(6, num_text_blocks)
        assert answers == expected
        assert num_right > 20
