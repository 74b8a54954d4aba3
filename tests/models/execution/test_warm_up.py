"""The steps at start launch every variant of every kernel that any later step launches.

Kernels are replaced by stand-ins that note what would be compiled, and compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import BLOCK_SIZE, loaded
from torch import Tensor

from vlmserve.models.attention import triton_paged, work_items
from vlmserve.models.attention.triton_paged import TritonBackend
from vlmserve.models.batch import PoolSizes, StepBatch
from vlmserve.models.decoder import kernel_launch
from vlmserve.models.decoder.decoder import FusedDecoder
from vlmserve.models.decoder.int8.linear import FEW_ROWS_CUDA
from vlmserve.models.decoder.int8.product import block_m_of, tiles_of
from vlmserve.models.decoder.operations import TritonOperations
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.execution.warm_up import GREEDY, probe_sequence, warm_up, warm_up_batches
from vlmserve.models.kv_cache.pool_sizes import PoolPlan

MAX_TOKENS = 700
PLAN = PoolPlan(PoolSizes(200, 40, BLOCK_SIZE), 800)


class Noted:
    """A kernel's stand-in: notes the constants and types that a launch would compile for."""

    def __init__(self, name: str, variants: set[str]) -> None:
        self._name, self._variants = name, variants

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            types = [str(one.dtype) for one in args if isinstance(one, Tensor)]
            self._variants.add(repr((self._name, types, sorted(constants.items()))))

        return launch


def noted(module: ModuleType, variants: set[str]) -> Any:
    names = [name for name in vars(module) if name.endswith("_kernel")]
    return SimpleNamespace(**{name: Noted(name, variants) for name in names})


@pytest.fixture
def runner_and_variants(monkeypatch: pytest.MonkeyPatch) -> tuple[ModelRunner, set[str]]:
    """A tiny model, whose keys are cut as early in proportion as a real one's."""
    variants: set[str] = set()
    monkeypatch.setattr(work_items, "KEYS_AT_ONCE", 2)
    monkeypatch.setattr(triton_paged, "MIN_PIECE", 4)
    monkeypatch.setattr(triton_paged, "MIN_TILE_PIECE", 18)
    backend = TritonBackend()
    backend._kernels = noted(backend._kernels, variants)
    monkeypatch.setattr(
        kernel_launch, "fused_kernels", noted(kernel_launch.fused_kernels, variants)
    )
    runner = ModelRunner(loaded("tiny"), PLAN, backend)
    vocab_size = runner.info.vocab_size
    monkeypatch.setattr(runner, "_logits", lambda hidden: torch.zeros(len(hidden), vocab_size))
    runner._fused = FusedDecoder(loaded("tiny").model.model.language_model, TritonOperations())
    return runner, variants


def random_batch(runner: ModelRunner, rng: np.random.Generator) -> StepBatch:
    """Decodes and chunks with pasts of any length, some of which see images."""
    rows = []
    left = MAX_TOKENS
    for row in range(rng.integers(1, 65)):
        num_tokens = int(rng.choice([1, 1, 1, 1, 2, 5, 17, 40, 120, 400]))
        num_tokens = 1 if rng.random() < 0.5 else num_tokens
        if num_tokens > left:
            break
        left -= num_tokens
        past = int(rng.choice([0, 0, 3, 60, 399]))
        tiles = list(range(int(rng.choice([0, 0, 1, 4]))))
        size = runner.info.pools.block_size
        rows.append(probe_sequence(f"{row}", num_tokens, num_tokens + past, size, tiles, GREEDY))
    return StepBatch(rows)


def test_no_later_step_launches_a_variant_that_was_not_compiled_at_start(
    runner_and_variants,
) -> None:
    """One of these took a third of a second to a second in the middle of serving."""
    runner, variants = runner_and_variants
    warm_up(runner, max_num_seqs=64, max_num_batched_tokens=MAX_TOKENS)
    warmed = set(variants)
    rng = np.random.default_rng(0)
    for _ in range(150):
        runner.execute(random_batch(runner, rng))
    assert not variants - warmed, variants - warmed
    # both forms of every launch were there, for text and for images
    for part in ("'IS_CUT', True", "'IS_CUT', False"):
        for queries in ("'BLOCK_Q', 1)", "'BLOCK_Q', 16)"):
            found = [one for one in warmed if part in one and queries in one]
            assert len(found) == 2, (part, queries, found)


def test_the_steps_have_every_way_to_compute_a_quantized_product(runner_and_variants) -> None:
    runner, _ = runner_and_variants
    counts = {
        sum(len(row.token_ids) for row in batch.sequences)
        for batch in warm_up_batches(runner.info, 64, MAX_TOKENS)
    }
    few = {count for count in counts if count <= FEW_ROWS_CUDA}
    ways = {(tiles_of(rows), block_m_of(rows)) for rows in range(1, FEW_ROWS_CUDA + 1)}
    assert {(tiles_of(rows), block_m_of(rows)) for rows in few} == ways
    assert max(counts) > FEW_ROWS_CUDA


@pytest.mark.parametrize(
    ("plan", "max_num_seqs", "max_num_batched_tokens"),
    [
        (PLAN, 1, 1),
        (PLAN, 64, 64),
        (PoolPlan(PoolSizes(1, 0, BLOCK_SIZE), 16), 2, 3),
        (PoolPlan(PoolSizes(9, 2, BLOCK_SIZE), 30), 1, 2_048),
    ],
)
@torch.inference_mode()
def test_the_steps_stay_within_small_limits(plan, max_num_seqs, max_num_batched_tokens) -> None:
    runner = ModelRunner(loaded("tiny"), plan)
    assert warm_up(runner, max_num_seqs, max_num_batched_tokens) > 0
    for batch in warm_up_batches(runner.info, max_num_seqs, max_num_batched_tokens):
        assert len(batch.sequences) <= max_num_seqs
        assert sum(len(row.token_ids) for row in batch.sequences) <= max_num_batched_tokens
        assert all(row.start >= 0 for row in batch.sequences)
