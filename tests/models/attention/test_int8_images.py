"""Attention over images in int8, against dense attention over the same values in float64.

Every slot that no row owns has a scale of NaN, so a backend that reads one cannot pass.
Tolerances: 1e-5 in float32, 3e-2 in bfloat16 (values of order 1).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.attention_cases import SCALE, Case, cpu_backend, dense, make_case, needs_interpreter
from torch import Tensor

from vlmserve.models.attention import AttentionBackend, Geometry
from vlmserve.models.attention.choice import choose_backend
from vlmserve.models.attention.flash_attn_package import FlashAttnBackend
from vlmserve.models.attention.int8_states import (
    SCALE_DTYPE,
    Int8States,
    entry_bytes,
    gather_states,
)
from vlmserve.models.attention.sdpa import SdpaBackend
from vlmserve.models.attention.trial import what_is_wrong
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.kernels import c_library

CPU, TILE = torch.device("cpu"), 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
ROWS = {
    "decodes of any number of tiles": [(1, 5), (1, 20), (1, 0), (1, 10)],
    "decodes and chunks": [(4, 20), (1, 5), (3, 0), (18, 10)],
}
BACKENDS = [
    pytest.param(SdpaBackend, id="sdpa"),
    pytest.param(cpu_backend, id="cpu"),
    pytest.param(TritonBackend, id="triton", marks=needs_interpreter()),
    pytest.param(lambda: TritonBackend(16), id="triton-pieces", marks=needs_interpreter()),
]


def quantized(cache: Tensor) -> Int8States:
    """A pool whose written slots are the cache's finite ones; all others have a scale of NaN."""
    codes = torch.zeros(cache.shape, dtype=torch.int8)
    scales = torch.full(cache.shape[:-1], float("nan"), dtype=SCALE_DTYPE)
    stored = Int8States(codes, scales, cache.dtype)
    rows = cache.flatten(0, 1)
    slots = rows.isfinite().all(-1).all(-1).nonzero()[:, 0]
    stored.write(rows[slots], slots)
    return stored


def of_stored(case: Case, keys: Int8States, values: Int8States) -> Case:
    """The case with the values that int8 has left of its keys and values."""

    def unpaged(states: Int8States) -> list[Tensor]:
        whole = replace(states, dtype=torch.float32)
        found = []
        for row, key_len in enumerate(case.rows.key_lens):
            blocks = torch.as_tensor(case.rows.block_table[row])
            slots = (blocks[:, None] * TILE + torch.arange(TILE)).flatten()[: int(key_len)]
            found.append(gather_states(whole, slots).view(-1, *states.shape[-2:]))
        return found

    return replace(case, keys=unpaged(keys), values=unpaged(values))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("make", BACKENDS)
def test_attention_over_int8_is_dense_attention_over_what_is_stored(
    make, rows: str, dtype: torch.dtype
) -> None:
    case = make_case(ROWS[rows], is_causal=False, block_size=TILE, dtype=dtype)
    keys, values = quantized(case.key_cache), quantized(case.value_cache)
    backend: AttentionBackend = make()
    plan = backend.prepare(case.rows, CPU, dtype)
    output = backend.attend(case.query, keys, values, plan, SCALE)
    assert output.dtype == dtype
    expected = dense(of_stored(case, keys, values), SCALE).to(dtype)
    torch.testing.assert_close(output, expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("make", BACKENDS[:2])
def test_backends_write_the_same_codes_and_scales(make) -> None:
    states = torch.randn(7, 2, 16)
    slots = torch.tensor([9, 3, 0, 14, 1, 2, 8])
    pools = [quantized(torch.full((3, TILE, 2, 16), float("nan"))) for _ in range(2)]
    make().write(states, -states, *pools, slots)
    stored = gather_states(pools[0], slots).view(states.shape)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((stored - states).abs() <= 0.51 * step + 2**-8 * states.abs()).all()
    torch.testing.assert_close(gather_states(pools[1], slots).view(states.shape), -stored)
    assert pools[0].scales.isnan().all(-1).sum() == 3 * TILE - len(slots)


def test_a_token_of_large_norm_costs_the_others_nothing() -> None:
    """With one scale a tile, the error of the others was 17% (docs/log.md)."""
    states = torch.randn(100, 2, 128)
    states[7] *= 20
    pool = quantized(torch.full((1, 100, 2, 128), float("nan")))
    pool.write(states, torch.arange(100))
    stored = gather_states(pool, torch.arange(100)).view(states.shape)
    errors = (stored - states).norm(dim=-1) / states.norm(dim=-1)
    assert errors.max() < 0.01


def test_zeros_stay_zeros_and_a_value_beyond_half_precision_stays_finite() -> None:
    pool = quantized(torch.full((1, 2, 1, 4), float("nan")))
    pool.write(torch.tensor([[[0.0] * 4], [[1e6, -3e5, 0.0, 1.0]]]), torch.arange(2))
    stored = gather_states(pool, torch.arange(2))
    assert stored[0].tolist() == [0.0] * 4
    torch.testing.assert_close(stored[1, :2], torch.tensor([1e6, -3e5]), rtol=0.02, atol=0)


def test_a_token_takes_its_codes_and_two_bytes_a_head() -> None:
    pool = quantized(torch.zeros(2, 3, 4, 128))
    assert pool.nbytes == 2 * 3 * 4 * entry_bytes(128) == 2 * 3 * 4 * 130


@needs_interpreter()
def test_the_trial_of_a_backend_reads_int8_and_finds_a_wrong_scale(monkeypatch) -> None:
    geometry = Geometry(CPU, torch.float32, 6, 2, 16, TILE, has_int8_images=True)
    backend = TritonBackend()
    assert what_is_wrong(backend, geometry, 4) is None
    attend, seen = backend._attend, []

    def without_scales(query, keys, values, *rest):
        seen.append(isinstance(keys, Int8States))
        if seen[-1]:
            keys = replace(keys, scales=torch.ones_like(keys.scales))
        attend(query, keys, values, *rest)

    monkeypatch.setattr(backend, "_attend", without_scales)
    assert what_is_wrong(backend, geometry, 4) is not None
    assert any(seen)


def test_backends_that_cannot_read_int8_say_so_and_are_not_chosen() -> None:
    cuda = Geometry(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 1601, has_int8_images=True)
    assert FlashAttnBackend.why_not(cuda) == "it cannot read images in int8"
    with c_library.allowed(False):
        chosen = choose_backend("auto", replace(cuda, device=CPU))
    assert (chosen.backend.name, chosen.has_int8_images) == ("sdpa", True)
