"""Images copied out of one runner's pool and into another's: the same logits without encoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.oracle import BLOCK_SIZE, Blocks, loaded, prefill_logits, requests, schedule

from vlmserve.models.batch import PoolSizes, StepBatch
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan

SIZES = PoolSizes(200, 60, BLOCK_SIZE)


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_loaded_image_is_the_encoded_one(is_int8: bool) -> None:
    plan = PoolPlan(replace(SIZES, has_int8_images=is_int8), 200)
    encoding, loading = (ModelRunner(loaded("tiny"), plan) for _ in range(2))
    (request,) = requests("three")
    batch = schedule(request, len(request.token_ids), Blocks(plan.sizes, seed=1))
    for index, image in enumerate(batch.images):
        image.keep_as = str(index)
    result = encoding.execute(batch)
    copies = [result.kept[str(index)]() for index in range(3)]
    assert [len(one) for one in copies] == [
        len(image.block_ids) * encoding.info.tile_bytes for image in batch.images
    ]
    (again,) = requests("three")
    other = schedule(again, len(again.token_ids), Blocks(plan.sizes, seed=2))
    loads = {tuple(image.block_ids): data for data, image in zip(copies, other.images, strict=True)}
    found = loading.compute_logits(StepBatch(other.sequences, loads=loads))
    (expected,) = prefill_logits(encoding, requests("three"), chunk=1000).values()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_copy_keeps_what_later_steps_overwrite_in_the_pool() -> None:
    runner = ModelRunner(loaded("tiny"), PoolPlan(SIZES, 200))
    (first,), (second,) = requests("one"), requests("late")
    batch = schedule(first, len(first.token_ids), Blocks(SIZES, seed=1))
    batch.images[0].keep_as = "it"
    copy = runner.execute(batch).kept["it"]
    before = bytes(copy())
    for layer in runner.pools.layers:
        layer.keys.zero_()  # type: ignore[union-attr]
    runner.execute(schedule(second, len(second.token_ids), Blocks(SIZES, seed=1)))
    assert bytes(copy()) == before
    assert any(before)
