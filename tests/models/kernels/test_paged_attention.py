"""Attention of single queries in C: right for every group and head, and its bits are its own."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.oracle import checkpoint, oracle_logits, prefill_logits, requests
from torch import Tensor

from vlmserve.models.attention.int8_states import SCALE_DTYPE
from vlmserve.models.create_runner import create_runner
from vlmserve.models.kernels import c_library, paged_attention
from vlmserve.models.kernels.paged_attention import PagedQueries
from vlmserve.models.settings.runner_config import RunnerConfig

BLOCK_SIZE, NUM_KV_HEADS = 16, 2
# keys that fill no chunk, one, and more than two, which the sums are carried through
KEY_LENS = [1, 7, 64, 65, 150]


@pytest.fixture(autouse=True)
def library() -> None:
    if not paged_attention.fits(torch.float32, 64):
        pytest.skip("no C compiler is installed")


class Pool:
    """Random keys and values of a layer, and queries that see some of them in any order."""

    def __init__(self, group: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(group * head_dim)
        num_blocks = -(-max(KEY_LENS) // BLOCK_SIZE)
        count = len(KEY_LENS)
        shape = (count * num_blocks, BLOCK_SIZE, NUM_KV_HEADS, head_dim)
        self.keys = torch.randn(shape, generator=draw).to(dtype)
        self.values = torch.randn(shape, generator=draw).to(dtype)
        self.query = torch.randn(count, group * NUM_KV_HEADS, head_dim, generator=draw).to(dtype)
        self.table = torch.randperm(len(self.keys), generator=draw).view(count, num_blocks)

    def attend(self, *rows: int, scales: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The outputs of these rows, zeros in all others."""
        result = torch.zeros_like(self.query)
        lens = torch.tensor([KEY_LENS[row] for row in rows])
        which = torch.tensor(rows)
        queries = PagedQueries(which, lens, which, self.table, BLOCK_SIZE)
        paged_attention.attend(self.query, self.keys, self.values, scales, queries, 0.2, result)
        return result

    def expected(self) -> Tensor:
        """The same by plain products in float64."""
        outputs = []
        for row, length in enumerate(KEY_LENS):
            keys, values = (
                states[self.table[row]].flatten(0, 1)[:length].double()
                for states in (self.keys, self.values)
            )
            query = self.query[row].double().unflatten(0, (NUM_KV_HEADS, -1))
            weights = (torch.einsum("kgd,jkd->kgj", query, keys) * 0.2).softmax(-1)
            outputs.append(torch.einsum("kgj,jkd->kgd", weights, values).flatten(0, 1))
        return torch.stack(outputs)


EVERY = range(len(KEY_LENS))


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
def test_every_group_of_heads_and_width_is_right(group: int, head_dim: int) -> None:
    pool = Pool(group, head_dim)
    torch.testing.assert_close(pool.attend(*EVERY).double(), pool.expected(), atol=5e-6, rtol=1e-5)


def test_the_other_rows_and_the_threads_change_no_bit() -> None:
    pool = Pool(3, 64, torch.bfloat16)
    together = pool.attend(*EVERY)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for row in EVERY:
                alone = pool.attend(row)
                assert torch.equal(alone[row], together[row])
                assert not alone[torch.arange(len(KEY_LENS)) != row].any()
    finally:
        torch.set_num_threads(threads)


def test_keys_that_are_not_seen_are_not_read() -> None:
    pool = Pool(2, 64)
    whole = pool.attend(1)
    pool.keys[pool.table[1, 0], KEY_LENS[1] :] = float("nan")
    pool.values[pool.table[1, 1:]] = float("nan")
    assert torch.equal(pool.attend(1), whole)


def test_a_key_that_is_no_number_is_not_hidden() -> None:
    pool = Pool(2, 64)
    pool.keys[pool.table[4, 3], 2] = float("nan")
    assert pool.attend(*EVERY)[4].isnan().all()
    assert pool.attend(*EVERY)[:4].isfinite().all()


def test_scores_of_any_size_give_weights() -> None:
    pool = Pool(2, 64)
    pool.query *= 1e4
    torch.testing.assert_close(pool.attend(*EVERY).double(), pool.expected(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_with_scales_are_their_products(dtype: torch.dtype) -> None:
    pool, plain = Pool(4, 64), Pool(4, 64)
    codes = [(states * 20).round().clamp(-127, 127) for states in (pool.keys, pool.values)]
    scales = [
        torch.rand(states.shape[:3], generator=torch.Generator().manual_seed(1)).to(SCALE_DTYPE)
        for states in codes
    ]
    plain.keys, plain.values = (
        states * scale.float()[..., None] for states, scale in zip(codes, scales, strict=True)
    )
    pool.keys, pool.values = (states.to(torch.int8) for states in codes)
    pool.query = plain.query = (pool.query / 30).to(dtype)
    found = pool.attend(*EVERY, scales=(scales[0], scales[1]))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.double(), plain.expected(), atol=tolerance, rtol=tolerance)


def test_a_model_that_reads_blocks_in_place_gives_the_oracles_logits(monkeypatch) -> None:
    """The tests' models are too small to do so otherwise. Chunks of 6 tokens are a few queries."""
    if not paged_attention.fits(torch.float32, 16):
        pytest.skip("vectors are wider than a head")
    monkeypatch.setattr(c_library, "MIN_HIDDEN", 1)
    attend = mock.Mock(wraps=paged_attention.attend)
    monkeypatch.setattr(paged_attention, "attend", attend)
    config = RunnerConfig(
        device="cpu", dtype="float32", block_size=4, num_text_blocks=200, num_image_blocks=40
    )
    runner = create_runner(checkpoint("tiny"), config)
    batch = requests()
    found = prefill_logits(runner, batch, chunk=6)
    assert attend.called
    for request in batch:
        expected = oracle_logits("tiny", request)
        torch.testing.assert_close(found[request.request_id], expected, atol=4e-5, rtol=0.0)
