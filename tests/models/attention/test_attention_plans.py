"""How backends lay out their calls: buckets of the reference, tiles of the flash backends."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import fake_kernels
from support.attention_cases import SCALE, Subject, attend, dense, make_case
from support.fake_kernels import FLASH_ATTN, varlen_attn_of
from support.oracle import BLOCK_SIZE, loaded, oracle_logits, prefill_logits, requests

from vlmserve.models import device_copies
from vlmserve.models.attention import PagedRows, get_backend, sdpa, tiles
from vlmserve.models.attention.flash_attn_package import FlashAttnBackend, FlashAttnKernels
from vlmserve.models.attention.tiles import plan_tiles
from vlmserve.models.attention.torch_varlen import NEEDED, VarlenBackend
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.batch import PoolSizes
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan

CPU = torch.device("cpu")
NUM_PATCHES = 5


def image_rows(query_lens: list[int], blocks: list[list[int]]) -> PagedRows:
    """Rows that see these image blocks."""
    table = np.zeros((len(blocks), max(map(len, blocks))), dtype=np.int64)
    for row, ids in zip(table, blocks, strict=True):
        row[: len(ids)] = ids
    starts = np.concatenate([[0], np.cumsum(query_lens)])
    key_lens = np.array([len(ids) * NUM_PATCHES for ids in blocks])
    return PagedRows(starts, key_lens, table, NUM_PATCHES, is_causal=False)


def check(backend, case) -> None:
    output = attend(Subject(lambda: backend), case)
    torch.testing.assert_close(output.double(), dense(case, SCALE), atol=1e-5, rtol=0.0)


def test_long_chunks_are_cut_and_large_groups_split(monkeypatch) -> None:
    monkeypatch.setattr(sdpa, "MAX_MASKED_QUERIES", 4)
    monkeypatch.setattr(sdpa, "MAX_BUCKET_KEYS", 16)
    case = make_case([(11, 30), (4, 9), (1, 12), (1, 12), (1, 12)], is_causal=True)
    plan = get_backend("sdpa").prepare(case.rows, CPU, torch.float32)
    assert max(bucket.query_len for bucket in plan) == 4
    assert max(bucket.num_rows for bucket in plan) == 1
    check(get_backend("sdpa"), case)


def test_a_tile_is_one_sequence_of_all_queries_that_see_it() -> None:
    """Tiles 3 and 4 lie together, 9 behind a gap; token 2 sees none."""
    rows = image_rows([1, 1, 1, 2], [[4, 3], [9], [], [3]])
    (part,) = plan_tiles(rows, CPU)
    assert part.call.key_starts.tolist() == [0, 15, 20, 25, 45, 50]
    assert part.call.query_starts.tolist() == [0, 0, 3, 4, 4, 5]
    assert part.call.max_queries == 3
    assert part.call.max_keys == 20
    assert part.seeing.tolist() == [0, 1, 3, 4]
    assert part.pairs.tolist() == [0, 3, 4, 0, 1]
    assert part.merge.tolist() == [[3, 0], [4, 0], [1, 0], [2, 0]]
    assert part.is_padding is not None
    assert part.is_padding.tolist() == [[False, False], [False, True], [False, True], [False, True]]


def test_rows_that_see_no_tile_need_no_call() -> None:
    assert plan_tiles(image_rows([3, 1], [[], []]), CPU) == []


def test_rows_over_parts_of_an_image_block_are_our_own_mistake() -> None:
    rows = PagedRows(np.array([0, 1]), np.array([7]), np.array([[0, 1]]), NUM_PATCHES, False)
    with pytest.raises(AssertionError, match="whole image blocks"):
        plan_tiles(rows, CPU)


def test_many_pairs_are_computed_in_parts(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "MAX_PAIRS", 6)
    case = make_case([(4, 10), (1, 0), (3, 20), (1, 5)], is_causal=False, block_size=NUM_PATCHES)
    plan = plan_tiles(case.rows, CPU)
    assert [len(part.pairs) for part in plan] == [6, 6, 8, 1]
    check(FlashAttnBackend(FLASH_ATTN), case)


def test_pure_decodes_take_the_kv_cache_form_and_mixed_steps_the_varlen_form() -> None:
    calls = []
    recorded = FlashAttnKernels(
        lambda *args, **kwargs: calls.append("varlen") or FLASH_ATTN.varlen(*args, **kwargs),
        lambda *args, **kwargs: calls.append("kvcache") or FLASH_ATTN.with_kvcache(*args, **kwargs),
    )
    for lens in ([(1, 9), (1, 300)], [(1, 9), (4, 300)]):
        check(FlashAttnBackend(recorded), make_case(lens, is_causal=True, block_size=256))
    assert calls == ["kvcache", "varlen"]


@pytest.mark.parametrize("lens", [[(1, 9), (1, 300)], [(1, 9), (4, 300)]])
def test_a_wrong_block_table_fails_against_dense_attention(lens) -> None:
    """The suite's own check: a stand-in that forgave a wrong table would prove nothing."""
    case = make_case(lens, is_causal=True, block_size=256)
    case.rows.block_table[1] = case.rows.block_table[1][::-1]
    for backend in (FlashAttnBackend(FLASH_ATTN), VarlenBackend(varlen_attn_of("FA2"), "FA2")):
        with pytest.raises(AssertionError, match="not close"):
            check(backend, case)


def test_blocks_of_another_size_fail_in_the_stand_ins_as_in_the_kernels() -> None:
    case = make_case([(1, 9)], is_causal=True, block_size=16)
    with pytest.raises(AssertionError, match="divisible by 256"):
        check(FlashAttnBackend(FLASH_ATTN), case)


def test_the_stand_in_for_varlen_attn_has_torchs_own_signature() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    real = inspect.signature(varlen.varlen_attn).parameters
    if any(name not in real for name in NEEDED):
        pytest.skip(f"torch {torch.__version__} has no block tables in varlen_attn")
    assert list(real) == list(inspect.signature(varlen_attn_of("FA2")).parameters)


@pytest.mark.parametrize(
    "backend",
    [
        FlashAttnBackend(FLASH_ATTN),
        VarlenBackend(varlen_attn_of("FA2"), "FA2"),
        pytest.param(TritonBackend(), marks=pytest.mark.slow),
        pytest.param(TritonBackend(piece=32), marks=pytest.mark.slow),
    ],
    ids=lambda backend: backend.name,
)
def test_a_model_on_every_backend_equals_the_oracle_at_every_position(backend, monkeypatch) -> None:
    """Chunks of prompts with any images, batched: every logit to 1e-4 in float32."""
    monkeypatch.setattr(fake_kernels, "BLOCK_MULTIPLE", BLOCK_SIZE)
    layout = "tiny"
    sizes = PoolSizes(200, 40, BLOCK_SIZE)
    model = ModelRunner(loaded(layout), PoolPlan(sizes, 200 * BLOCK_SIZE), backend)
    asked = requests()
    logits = prefill_logits(model, asked, chunk=5)
    for request in asked:
        expected = oracle_logits(layout, request)
        torch.testing.assert_close(logits[request.request_id], expected, atol=1e-4, rtol=1e-4)


def test_a_long_prompt_beside_short_decodes_does_not_cut_their_keys() -> None:
    """Most of the pieces were empty, and cost a merge."""
    case = make_case([(1, 100), (40, 3000)], is_causal=True)
    single, _ = TritonBackend().prepare(case.rows, CPU, torch.float32).launches
    assert not single.is_cut


def test_partial_results_are_as_many_as_the_items() -> None:
    """They were as many as the step's tokens: a GiB for one decode beside a chunk of 2,048."""
    case = make_case([(1, 600), (40, 40), (1, 9)], is_causal=True)
    backend, partials = TritonBackend(piece=256), []
    kernel = backend._kernels.attend_kernel

    class Kept:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                partials.append(args[6:8])
                kernel[grid](*args, **constants)

            return launch

    backend._kernels = SimpleNamespace(
        attend_kernel=Kept(), merge_kernel=backend._kernels.merge_kernel
    )
    check(backend, case)
    num_heads, head_dim = case.query.shape[1:]
    assert partials[0][0].shape == (4, 1, num_heads, head_dim)
    assert partials[0][1].shape == (4, 1, num_heads)


def test_single_queries_and_longer_rows_are_launched_apart_the_longest_first() -> None:
    case = make_case([(1, 9), (40, 50), (1, 300), (16, 16)], is_causal=True)
    single, longer = TritonBackend().prepare(case.rows, CPU, torch.float32).launches
    assert single.block_q == 1
    assert single.items.rows.tolist() == [2, 2, 2, 0]
    assert single.items.pieces.tolist() == [0, 1, 2, 0]
    assert single.items.split.tolist() == [0]
    assert single.items.sizes.tolist() == [128, 75]
    assert (longer.block_q, longer.is_cut) == (16, False)
    assert longer.items.rows.tolist() == [1, 1, 1, 3]
    assert longer.offsets.tolist() == [32, 16, 0, 0]


def test_a_few_queries_behind_a_long_past_are_cut_too() -> None:
    """A turn of a long chat: two tiles of queries had a GPU for themselves."""
    case = make_case([(20, 2_500), (1, 9)], is_causal=True, num_kv_heads=1, group=2)
    plan = TritonBackend().prepare(case.rows, CPU, torch.float32)
    _, longer = plan.launches
    assert longer.items.rows.tolist() == [0] * 6
    assert longer.offsets.tolist() == [16, 16, 16, 0, 0, 0]
    assert longer.items.split.tolist() == [0, 3]
    check(TritonBackend(), case)


def test_images_are_cut_in_the_middle_of_a_tile() -> None:
    case = make_case([(3, 0), (1, 40), (20, 15), (1, 5)], is_causal=False, block_size=NUM_PATCHES)
    check(TritonBackend(piece=7), case)


def test_the_lists_of_a_step_reach_a_device_in_one_copy(monkeypatch) -> None:
    """Each was pinned and copied by itself: a third of a millisecond a step."""
    uploads = []
    monkeypatch.setattr(
        device_copies, "_to_device", lambda host, device: uploads.append(host) or host
    )
    case = make_case([(1, 9), (40, 50), (1, 300), (16, 16)], is_causal=True)
    meta = TritonBackend().prepare(case.rows, torch.device("meta"), torch.float32)
    (packed,) = uploads
    on_cpu = TritonBackend().prepare(case.rows, CPU, torch.float32)
    for moved, direct in zip(lists_of(meta), lists_of(on_cpu), strict=True):
        assert torch.equal(moved, direct)
        assert (moved.data_ptr() - packed.data_ptr()) % device_copies.ALIGNMENT == 0


def lists_of(plan) -> list[torch.Tensor]:
    """All tensors of a plan that have elements."""
    found = [plan.query_starts, plan.key_lens, plan.block_table]
    for launch in plan.launches:
        items = launch.items
        found += [items.rows, items.pieces, items.split, items.sizes, launch.offsets]
    return [one for one in found if one.numel()]


def test_a_token_without_a_slot_is_stored_nowhere() -> None:
    """Rows that only pad a batch to a captured size have no slot."""
    keys, values = torch.randn(2, 3, 2, 8).unbind()
    key_cache, value_cache = torch.zeros(2, 4, 4, 2, 8).unbind()
    TritonBackend().write(keys, values, key_cache, value_cache, torch.tensor([5, -1, 2]))
    for cache, fresh in ((key_cache, keys), (value_cache, values)):
        torch.testing.assert_close(cache.view(16, 2, 8)[[5, 2]], fresh[[0, 2]])
        assert cache.abs().sum().item() == pytest.approx(fresh[[0, 2]].abs().sum().item())
