"""Penalties, biases, bans and min_p: against transformers, and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.sampled import NUM_DRAWS, chi_square_is_plausible, context_of, sample
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmserve.models.batch import SamplingContext, SamplingParams
from vlmserve.models.device_copies import upload
from vlmserve.models.errors import NonFiniteLogitsError
from vlmserve.models.sampling import penalties, sampler
from vlmserve.models.sampling.penalties import adjust
from vlmserve.models.sampling.token_counts import DistinctIds

VOCAB = 40
PROMPT = [3, 3, 7, 11, 30]
GENERATED = [7, 5, 5, 5, 39]
CONTEXT = context_of(PROMPT, GENERATED)


def random_logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(logits: Tensor, params: SamplingParams, context: SamplingContext | None) -> Tensor:
    changed = logits.clone()
    adjust(changed, [params] * len(logits), [context] * len(logits))
    return changed


def defined(logits: Tensor, params: SamplingParams, context: SamplingContext) -> np.ndarray:
    """The logits after penalties, biases and bans, token by token from their definitions."""
    values = logits.double().numpy().copy()
    for token_id in {*context.prompt_token_ids, *context.generated_token_ids}:
        factor = params.repetition_penalty
        values[token_id] *= factor if values[token_id] < 0 else 1 / factor
    counts = zip(context.generated_token_ids, context.generated_counts, strict=True)
    for token_id, count in counts:
        values[token_id] -= params.presence_penalty + count * params.frequency_penalty
    for token_id, bias in params.logit_bias:
        values[token_id] += bias
    values[list(context.banned_token_ids)] = -np.inf
    return values


def defined_distribution(
    logits: Tensor, params: SamplingParams, context: SamplingContext
) -> np.ndarray:
    """Softmax at the temperature, then top-k, top-p and min-p one after another."""
    scores = defined(logits, params, context) / params.temperature
    probabilities = np.exp(scores - scores.max())
    if params.top_k > 0:
        probabilities[np.argsort(-probabilities, kind="stable")[params.top_k :]] = 0
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if params.top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("penalty", [0.3, 0.8, 1.2, 2.0])
def test_the_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(rows=8)
    seen = torch.tensor([PROMPT + GENERATED]).expand(8, -1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits)
    got = adjusted(logits, SamplingParams(repetition_penalty=penalty), CONTEXT)
    torch.testing.assert_close(got, expected, atol=0.0, rtol=1e-6)


def test_a_bias_equals_transformers() -> None:
    logits = random_logits()
    bias = SequenceBiasLogitsProcessor({(5,): -2.5, (0,): 100.0})
    bias.prepared_bias_variables = False
    got = adjusted(logits, SamplingParams(logit_bias=((5, -2.5), (0, 100.0))), None)
    torch.testing.assert_close(got, bias(torch.tensor([[1]]), logits), atol=0.0, rtol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(presence_penalty=1.5),
        SamplingParams(presence_penalty=-2.0),
        SamplingParams(frequency_penalty=0.7),
        SamplingParams(frequency_penalty=-0.3, presence_penalty=0.2),
        SamplingParams(
            repetition_penalty=1.3,
            frequency_penalty=0.5,
            presence_penalty=0.4,
            logit_bias=((5, 4.0), (7, -1.0), (12, 2.0)),
        ),
    ],
)
def test_penalties_equal_their_definitions(params: SamplingParams) -> None:
    logits = random_logits()
    got = adjusted(logits, params, CONTEXT)[0].double().numpy()
    np.testing.assert_allclose(got, defined(logits[0], params, CONTEXT), rtol=1e-5, atol=1e-6)


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt() -> None:
    logits = random_logits()
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=1.0)
    difference = (logits - adjusted(logits, params, CONTEXT))[0]
    expected = {7: 2.0, 5: 4.0, 39: 2.0}
    for token_id in range(VOCAB):
        assert difference[token_id].item() == pytest.approx(expected.get(token_id, 0.0), abs=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(SamplingParams(min_p=0.1), marks=pytest.mark.slow),
        pytest.param(SamplingParams(min_p=0.5, temperature=2.0), marks=pytest.mark.slow),
        SamplingParams(min_p=1.0, temperature=2.0),
        SamplingParams(min_p=0.05, top_k=9, top_p=0.9, temperature=1.5),
        pytest.param(SamplingParams(repetition_penalty=1.7), marks=pytest.mark.slow),
        pytest.param(SamplingParams(presence_penalty=2.0), marks=pytest.mark.slow),
        pytest.param(SamplingParams(frequency_penalty=-1.0), marks=pytest.mark.slow),
        SamplingParams(logit_bias=((4, 3.0), (0, -100.0))),
        SamplingParams(
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            logit_bias=((4, 3.0),),
            temperature=1.3,
            top_k=12,
            top_p=0.95,
            min_p=0.02,
        ),
    ],
)
@pytest.mark.parametrize("banned", [pytest.param((), marks=pytest.mark.slow), (1, 9)])
def test_draws_follow_the_exact_distribution(
    params: SamplingParams, banned: tuple[int, ...]
) -> None:
    vocab = 14
    logits = random_logits(seed=2, vocab=vocab) / 2
    context = context_of([3, 3, 7, 11], [7, 5, 5, 13], banned)
    token_ids = sample(
        logits.repeat(NUM_DRAWS, 1), [params] * NUM_DRAWS, range(NUM_DRAWS), [context] * NUM_DRAWS
    )
    counts = np.bincount(token_ids.numpy(), minlength=vocab)
    expected = defined_distribution(logits[0], params, context)
    assert chi_square_is_plausible(counts, expected * NUM_DRAWS)


@pytest.mark.parametrize("seed", range(20))
def test_the_filters_keep_what_transformers_keeps_in_its_order(seed: int) -> None:
    logits = random_logits(seed=seed)
    params = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.05)
    scores = logits / params.temperature
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        scores = warper(None, scores)
    seeds = [SamplingParams(**_fields(params), seed=number) for number in range(3000)]
    drawn = sample(logits.repeat(3000, 1), seeds, [0] * 3000)
    assert set(drawn.tolist()) == set(scores[0].isfinite().nonzero().flatten().tolist())


def _fields(params: SamplingParams) -> dict[str, float]:
    return {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def test_a_greedy_choice_heeds_penalties_biases_and_bans() -> None:
    greedy = {"temperature": 0.0}
    logits = torch.zeros(4, VOCAB)
    logits[:, 5], logits[:, 7], logits[:, 9] = 3.0, 2.0, 1.0
    params = [
        SamplingParams(**greedy),
        SamplingParams(**greedy, frequency_penalty=0.5),
        SamplingParams(**greedy, logit_bias=((9, 5.0),)),
        SamplingParams(**greedy, logit_bias=((5, 100.0),)),
    ]
    contexts = [None, context_of((), [5, 5, 5]), None, SamplingContext((), (), [5, 7])]
    assert sample(logits, params, [0] * 4, contexts).tolist() == [5, 7, 9, 9]


def test_a_rows_wishes_change_no_other_row() -> None:
    logits = random_logits(rows=60)
    rng = np.random.default_rng(0)
    wishes = [
        {},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": -0.5},
        {"logit_bias": ((1, 4.0), (2, -4.0))},
        {"min_p": 0.2},
    ]
    params, contexts = [], []
    for row in range(60):
        temperature = [0.0, 1.0][row % 2]
        params.append(SamplingParams(temperature=temperature, seed=row, **wishes[row % 5]))
        ids = rng.integers(0, VOCAB, 6).tolist()
        is_needed = params[row].has_penalties or row % 7 == 0
        banned = [row % VOCAB] if row % 7 == 0 else ()
        contexts.append(context_of(ids[:3], ids[3:], banned) if is_needed else None)
    together = sample(logits.clone(), params, [0] * 60, contexts).tolist()
    alone = [
        sample(logits[row : row + 1].clone(), [params[row]], [0], [contexts[row]]).item()
        for row in range(60)
    ]
    assert together == alone
    plain = [row for row in range(0, 60, 10) if contexts[row] is None]
    assert plain
    assert [together[row] for row in plain] == logits[plain].argmax(-1).tolist()


def test_a_prompt_is_uploaded_in_its_first_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its distinct tokens, thousands in a long prompt, were gathered in every step."""
    sizes: list[int] = []

    def counted(values: np.ndarray, *more: object) -> Tensor:
        sizes.append(np.size(values))
        return upload(values, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(penalties, "upload", counted)
    logits = random_logits(rows=2, vocab=5000)
    prompt = DistinctIds([*range(4000), 5000])
    params = [SamplingParams(), SamplingParams(repetition_penalty=1.5)]
    steps = []
    for generated in ([], [4500], [4500, 4500, 7]):
        changed = logits.clone()
        adjust(changed, params, [None, context_of(prompt, generated)])
        expected = defined(logits[1], params[1], context_of(range(4000), generated))
        np.testing.assert_allclose(changed[1].double().numpy(), expected, rtol=1e-5)
        steps.append(sum(sizes))
        sizes.clear()
    assert steps[0] == 4000 + 2
    assert max(steps[1:]) <= 2 + 2 * 2


def test_rows_without_wishes_are_left_untouched_bit_for_bit() -> None:
    logits = random_logits(rows=3)
    before = logits.clone()
    params = [SamplingParams(), SamplingParams(repetition_penalty=2.0), SamplingParams()]
    assert adjust(logits, params, [None, CONTEXT, None]) == [1]
    assert torch.equal(logits[::2], before[::2])
    assert not torch.equal(logits[1], before[1])


def test_a_greedy_step_without_wishes_is_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a greedy step draws nothing")

    monkeypatch.setattr(sampler, "_draw", forbidden)
    logits = random_logits(rows=5)
    before = logits.clone()
    assert sample(logits, [SamplingParams(temperature=0.0)] * 5, [0] * 5).tolist() == (
        before.argmax(-1).tolist()
    )
    assert torch.equal(logits, before)


def test_ids_without_a_logit_are_passed_over() -> None:
    """A prompt holds `<|image|>`, whose id is the first one past the vocabulary."""
    logits = random_logits(rows=2)
    params = SamplingParams(
        repetition_penalty=1.5, presence_penalty=1.0, logit_bias=((VOCAB, 100.0),)
    )
    context = context_of([VOCAB, VOCAB + 8], [VOCAB], [VOCAB])
    assert torch.equal(adjusted(logits, params, context), logits)


def test_a_client_that_bans_every_token_fails_nobody() -> None:
    logits = random_logits(rows=2)
    context = SamplingContext(banned_token_ids=list(range(VOCAB)))
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature)] * 2
        token_ids = sample(logits.clone(), params, [0, 0], [context, None]).tolist()
        assert 0 <= token_ids[0] < VOCAB
        assert token_ids[1] == sample(logits[1:].clone(), params[:1], [0]).item()


def test_allowed_tokens_keep_their_logits_and_a_grammar_goes_first() -> None:
    logits = random_logits(rows=1)
    params = SamplingParams(allowed_token_ids=(3, 7, VOCAB + 5))
    changed = adjusted(logits, params, None)[0]
    assert changed[[3, 7]].equal(logits[0, [3, 7]])
    others = [token_id for token_id in range(VOCAB) if token_id not in (3, 7)]
    assert set(changed[others].tolist()) == {torch.finfo(torch.float32).min}
    # What a form allows comes although it is not allowed otherwise: -inf is never undone.
    logits[0, :20] = -torch.inf
    token_id = sample(logits.clone(), [params], [0]).item()
    assert token_id >= 20


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-39])
def test_the_smallest_repetition_penalty_leaves_finite_logits(penalty: float) -> None:
    logits = random_logits(rows=1)
    logits[0, 3], logits[0, 7] = 0.0, -0.0
    params = SamplingParams(repetition_penalty=penalty, temperature=0.7)
    assert adjusted(logits, params, CONTEXT).isfinite().all()
    assert sample(logits, [params], [0], [CONTEXT]).item() in PROMPT + GENERATED


def test_no_penalty_hides_that_the_models_logits_are_not_finite() -> None:
    context = context_of([3], [3], [3])
    for value in (float("nan"), float("inf")):
        logits = random_logits(rows=2)
        logits[1, 3] = value
        params = [SamplingParams(repetition_penalty=1.5)] * 2
        with pytest.raises(NonFiniteLogitsError, match=r"rows \[1\]"):
            sample(logits, params, [0, 0], [context, context])


def test_what_the_model_rules_out_stays_so() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = float("-inf")
    params = SamplingParams(
        repetition_penalty=0.5, presence_penalty=-2.0, logit_bias=((3, 100.0),), temperature=2.0
    )
    context = context_of([3], [3, 3])
    token_ids = sample(logits.repeat(2000, 1), [params] * 2000, range(2000), [context] * 2000)
    assert 3 not in token_ids.tolist()
