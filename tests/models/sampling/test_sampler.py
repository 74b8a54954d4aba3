"""Sampling against exact probabilities, and its random streams' independence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.sampled import NUM_DRAWS, chi_square_is_plausible, sample
from torch import Tensor

from vlmserve.models.batch import SamplingParams
from vlmserve.models.errors import NonFiniteLogitsError
from vlmserve.models.sampling import sampler
from vlmserve.models.sampling.sampler import uniform

VOCAB = 12


def logits_of(seed: int = 0, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, VOCAB, generator=generator).expand(rows, VOCAB).contiguous() * 2


def exact(logits: Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution by definition: temperature, then top-k, then top-p of what is left."""
    scores = logits.double().numpy() / params.temperature
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    order = sorted(range(len(scores)), key=lambda i: (-probabilities[i], i))
    kept = order[: params.top_k] if params.top_k > 0 else order
    total, nucleus = sum(probabilities[i] for i in kept), []
    for i in kept:
        nucleus.append(i)
        if sum(probabilities[j] for j in nucleus) >= params.top_p * total and params.top_p < 1:
            break
    out = np.zeros_like(probabilities)
    out[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    return out


def draws(logits: Tensor, params: SamplingParams, by_seed: bool) -> np.ndarray:
    """Counts of NUM_DRAWS tokens: of as many requests' first, or of one request's stream."""
    rows = logits.expand(NUM_DRAWS, VOCAB).contiguous()
    fields = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
    if by_seed:
        every = [SamplingParams(**fields, seed=seed) for seed in range(NUM_DRAWS)]
        token_ids = sample(rows, every, [0] * NUM_DRAWS)
    else:
        token_ids = sample(rows, [params] * NUM_DRAWS, list(range(NUM_DRAWS)))
    return np.bincount(token_ids.numpy(), minlength=VOCAB)


@pytest.mark.parametrize("by_seed", [True, False], ids=["over seeds", "along one stream"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.5, top_k=6, top_p=0.7),
        SamplingParams(top_k=1000, top_p=0.999),
    ],
    ids=lambda p: f"t{p.temperature} k{p.top_k} p{p.top_p}",
)
def test_draws_follow_the_exact_distribution(params: SamplingParams, by_seed: bool) -> None:
    logits = logits_of(1)
    counts = draws(logits, params, by_seed)
    assert chi_square_is_plausible(counts, exact(logits[0], params) * NUM_DRAWS)


def test_the_chi_square_test_itself_tells_a_wrong_distribution() -> None:
    logits = logits_of(1)
    counts = draws(logits, SamplingParams(temperature=1.15), by_seed=True)
    assert not chi_square_is_plausible(counts, exact(logits[0], SamplingParams()) * NUM_DRAWS)


def test_uniforms_are_uniform_in_pairs_along_a_stream_and_over_seeds() -> None:
    """Lag-one pairs on a 10 x 10 grid, along one stream and over neighbouring seeds."""
    for numbers in (
        [uniform(5, i) for i in range(NUM_DRAWS)],
        [uniform(seed, 3) for seed in range(NUM_DRAWS)],
    ):
        assert min(numbers) >= 0.0
        assert max(numbers) < 1.0
        cells = (np.array(numbers) * 10).astype(int)
        counts = np.bincount(cells[:-1] * 10 + cells[1:], minlength=100).astype(float)
        assert chi_square_is_plausible(counts, np.full(100, (NUM_DRAWS - 1) / 100))


def test_neighbouring_seeds_are_not_shifts_of_each_other() -> None:
    streams = [[uniform(seed, i) for i in range(200)] for seed in range(50)]
    assert len({value for stream in streams for value in stream}) == 50 * 200


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, -(2**70)])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0.0 <= uniform(seed, 0) < 1.0


def test_greedy_rows_take_the_best_token_beside_sampled_ones() -> None:
    logits = torch.cat([logits_of(seed) for seed in range(6)])
    params = [SamplingParams(temperature=float(row % 2), seed=row) for row in range(6)]
    token_ids = sample(logits, params, [0] * 6)
    assert token_ids[::2].tolist() == logits[::2].argmax(-1).tolist()
    alone = [sample(logits[i : i + 1], [params[i]], [0]).item() for i in range(6)]
    assert token_ids.tolist() == alone


def test_a_draw_depends_on_its_own_row_seed_and_place_only() -> None:
    logits = torch.cat([logits_of(seed) for seed in range(40)])
    params = [
        SamplingParams(
            temperature=0.5 + (i % 4) / 2, top_k=[-1, 3][i % 2], top_p=1 - i / 100, seed=i
        )
        for i in range(40)
    ]
    places = [i * 7 % 11 for i in range(40)]
    together = sample(logits, params, places).tolist()
    order = np.random.default_rng(0).permutation(40).tolist()
    shuffled = sample(logits[order], [params[i] for i in order], [places[i] for i in order])
    assert shuffled.tolist() == [together[i] for i in order]
    alone = [sample(logits[i : i + 1], [params[i]], [places[i]]).item() for i in range(40)]
    assert together == alone
    elsewhere = sample(logits, params, [place + 1 for place in places]).tolist()
    assert elsewhere != together


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-9)])
def test_the_narrowest_filter_is_greedy(params: SamplingParams) -> None:
    logits = logits_of(3)
    assert (np.flatnonzero(draws(logits, params, True)) == logits.argmax().item()).all()


def test_a_tiny_temperature_is_greedy_and_not_an_error() -> None:
    logits = logits_of(4)
    for temperature in (1e-3, 1e-40, 1e-300):
        params = SamplingParams(temperature=temperature)
        assert sample(logits, [params], [0]).item() == logits.argmax().item()


def test_equal_logits_are_cut_by_the_lower_id() -> None:
    counts = draws(torch.zeros(1, VOCAB), SamplingParams(top_k=3), by_seed=True)
    assert np.flatnonzero(counts).tolist() == [0, 1, 2]


def test_a_banned_token_is_never_drawn() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, ::2] = float("-inf")
    counts = draws(logits, SamplingParams(), by_seed=True)
    assert (counts[::2] == 0).all()
    assert (counts[1::2] > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_that_names_the_rows(
    value: float, temperature: float
) -> None:
    logits = logits_of(0, rows=4).clone()
    logits[2, 5] = value
    with pytest.raises(NonFiniteLogitsError, match=r"rows \[2\] of 4"):
        sample(logits, [SamplingParams(temperature=temperature)] * 4, [0] * 4)


def test_a_row_that_bans_every_token_is_an_error() -> None:
    with pytest.raises(NonFiniteLogitsError):
        sample(torch.full((1, VOCAB), float("-inf")), [SamplingParams()], [0])


@pytest.mark.parametrize("num_levels", [3, 40, 100_000])
def test_the_window_of_best_tokens_cuts_as_a_sort_of_the_whole_row_does(
    monkeypatch: pytest.MonkeyPatch, num_levels: int
) -> None:
    """Few levels make many ties, at the cut and at the window's end as well."""
    rng = np.random.default_rng(num_levels)
    logits = rng.integers(0, num_levels, (60, 500)) * (12.0 / num_levels)
    params = [
        SamplingParams(
            top_k=int(rng.choice([-1, 1, 7, 63, 64, 65, 400, 900])),
            top_p=float(rng.choice([1.0, 0.05, 0.5, 0.9, 0.999])),
        )
        for _ in range(60)
    ]
    logits = torch.from_numpy(logits).float()
    best = logits.amax(dim=-1)

    def cut(window: sampler._Window) -> tuple[Tensor, Tensor | None]:
        kept, is_undecided = sampler._cut(logits, best, window, params)
        weights = torch.zeros(logits.shape, dtype=torch.float64)
        return weights.scatter_(-1, window.token_ids, kept), is_undecided

    whole, none = cut(sampler._ordered(logits, None))
    assert none is None
    ids = logits.topk(64, dim=-1).indices.sort(dim=-1).values
    windowed, is_undecided = cut(sampler._ordered(logits, ids))
    assert is_undecided is not None
    assert torch.equal(windowed[~is_undecided], whole[~is_undecided])
    is_beyond = (whole > 0).sum(-1) > 64
    assert is_undecided[is_beyond].all()
    assert is_beyond.any()
    assert num_levels == 3 or not is_undecided.all()


def token_by_definition(logits: Tensor, params: SamplingParams, number: float) -> tuple[int, bool]:
    """The token in float64 over the whole vocabulary, and whether rounding could change it."""
    weights = ((logits.double() - logits.double().max()) / params.temperature).exp()
    ordered, order = weights.sort(descending=True, stable=True)
    may_differ = False
    if params.top_k > 0:
        ordered[params.top_k :] = 0.0
    if params.top_p < 1.0:
        before, total = ordered.cumsum(-1) - ordered, ordered.sum()
        may_differ = bool((before / total - params.top_p).abs().min() < 1e-6)
        is_over = before >= params.top_p * total
        is_over[0] = False
        ordered[is_over] = 0.0
    kept = torch.zeros_like(weights).scatter_(-1, order, ordered)
    kept[kept < params.min_p] = 0.0
    cumulative = kept.cumsum(-1)
    return int(torch.searchsorted(cumulative, number * cumulative[-1], right=True)), may_differ


@pytest.mark.parametrize("num_levels", [1, 3, 40, 100_000])
def test_tokens_are_those_of_float64_over_the_whole_vocabulary(num_levels: int) -> None:
    """As before the cut worked on a window of float32 logits; few levels make many ties."""
    rng = np.random.default_rng(num_levels)
    levels = rng.integers(0, num_levels, (60, 3000)) * (14.0 / num_levels)
    logits = torch.from_numpy(levels * rng.choice([0.2, 1.0, 3.0], (60, 1))).float()
    params = [
        SamplingParams(
            temperature=float(rng.choice([1e-40, 0.3, 1.0, 1.7])),
            top_k=int(rng.choice([-1, 1, 40, 1023, 1024, 2000])),
            top_p=float(rng.choice([1.0, 0.1, 0.5, 0.9, 0.999])),
            min_p=float(rng.choice([0.0, 0.0, 0.05])),
            seed=row,
        )
        for row in range(60)
    ]
    drawn = sample(logits, params, range(60)).tolist()
    for row, param in enumerate(params):
        expected, may_differ = token_by_definition(logits[row], param, uniform(param.seed, row))
        # equal logits have equal weights, whose sums are exact in both
        assert drawn[row] == expected or (may_differ and num_levels > 1), (row, param)
    assert len(set(drawn)) > 30


def test_rows_whose_cut_lies_beyond_the_window_are_drawn_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy rows, decided ones, undecided ones and plain ones in one step."""
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 1, (40, 500))).float()
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 0.3, 2.0])),
            top_k=int(rng.choice([-1, 5, 63, 64, 400])),
            top_p=float(rng.choice([1.0, 0.5, 0.99])),
            min_p=float(rng.choice([0.0, 0.01])),
            seed=row,
        )
        for row in range(40)
    ]
    expected = sample(logits, params, range(40))
    monkeypatch.setattr(sampler, "WINDOW", 64)
    first = sampler.sample(logits, params, range(40))
    assert (first.token_ids == sampler.UNDECIDED).any()
    assert (first.token_ids >= 0).any()
    assert torch.equal(sample(logits, params, range(40)), expected)


def test_a_cut_within_the_window_sorts_no_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    ordered = sampler._ordered
    monkeypatch.setattr(
        sampler,
        "_ordered",
        lambda weights, ids: (
            sizes.append(weights.shape[-1] if ids is None else ids.shape[-1])
            or ordered(weights, ids)
        ),
    )
    logits = torch.from_numpy(np.random.default_rng(5).normal(0, 4, (2, 20_000))).float()
    sample(logits, [SamplingParams(top_p=0.9, seed=1), SamplingParams(top_k=50, seed=2)], [0, 0])
    assert sizes == [sampler.WINDOW]


@pytest.mark.parametrize("vocab_size", [7, 256, 3000])
def test_a_draw_without_a_cut_is_that_of_float64_weights(vocab_size: int) -> None:
    """At random numbers across the whole range, with banned tokens and ends of parts."""
    rng = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(rng.normal(0, 3, (400, vocab_size))).float()
    logits[rng.random(logits.shape) < 0.3] = -torch.inf
    logits[:, vocab_size // 2] = 0.0
    params = [SamplingParams(temperature=float(rng.choice([0.2, 1.0, 2.0]))) for _ in logits]
    uniforms = [0.0, *rng.random(398).tolist(), 1 - 2.0**-52]
    best = logits.amax(dim=-1)
    expected = sampler._pick(sampler._weights(logits, best, params), params, uniforms)
    actual = sampler._pick_uncut(sampler._float32_weights(logits, best, params), uniforms)
    assert actual[:-1].equal(expected[:-1])
    assert (logits.gather(-1, actual[:, None]) > -torch.inf).all(), "a banned token"


def test_only_a_cut_makes_float64_weights_of_a_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each plain draw made five passes of float64, slow on most GPUs."""
    shapes: list[tuple[int, ...]] = []
    weights = sampler._weights

    def noted(logits: Tensor, best: Tensor, params: list[SamplingParams]) -> Tensor:
        shapes.append(tuple(logits.shape))
        return weights(logits, best, params)

    monkeypatch.setattr(sampler, "_weights", noted)
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(2))
    kinds = [{}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0}]
    sample(logits, [SamplingParams(**kind) for kind in kinds], [0] * 4)
    assert shapes == [(2, sampler.WINDOW)]
    sample(logits[:1], [SamplingParams(min_p=0.1)], [0])
    assert shapes[1:] == [(1, 3000)]
