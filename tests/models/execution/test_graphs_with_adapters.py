"""Recorded decode steps with adapters against eager ones by torch, in Triton's interpreter.

A tape stands in for CUDA's graphs (support/taped.py). float32, 1e-4.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.adapters import MIXED
from support.oracle import (
    BLOCK_SIZE,
    Blocks,
    Request,
    image,
    join,
    loaded,
    oracle,
    prompt,
    schedule,
)
from support.taped import TapeRecorder, tape_operations, taped_backend

from vlmserve.models.batch import PoolSizes
from vlmserve.models.decoder.decoder import FusedDecoder
from vlmserve.models.decoder.operations import TritonOperations
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.lora import kernel_rows, store
from vlmserve.models.lora.limits import AdapterLimits

PLAN = PoolPlan(PoolSizes(100, 30, BLOCK_SIZE), 120)
LAYOUT = "tiny"


@pytest.mark.slow
def test_replays_read_each_steps_adapters(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots, three adapters: rows change their adapter, slots their weights, between replays.

    A step without adapters replays the plain graph.
    """
    recorder = TapeRecorder()
    tape_operations(recorder, monkeypatch)
    kernels = recorder.taped(kernel_rows.lora_kernels)
    monkeypatch.setattr(kernel_rows, "lora_kernels", kernels)
    limits = AdapterLimits(2, 8, torch.float32)
    eager = ModelRunner(loaded(LAYOUT), PLAN, None, limits)
    replaying = ModelRunner(loaded(LAYOUT), PLAN, taped_backend(recorder), limits)
    monkeypatch.setattr(store, "has_kernels", lambda device, dtype: True)
    text_model = loaded(LAYOUT).model.model.language_model
    replaying._fused = FusedDecoder(text_model, TritonOperations())
    graphs = replaying.record_graphs(2, recorder)
    assert graphs.num_graphs == 8  # of one and two rows, with images and adapters, or without
    refs = {n: MIXED[n].write(tmp_path / n, oracle(LAYOUT), n) for n in ("all", "qv", "text")}
    digests = {name: ref.digest for name, ref in refs.items()} | {"": ""}
    for runner in (eager, replaying):
        assert runner.adapters is not None
        for ref in refs.values():
            runner.adapters.read(ref)
    blocks, rng = Blocks(PLAN.sizes), np.random.default_rng(1)
    running = [prompt("text", "words"), prompt("seeing", "|what?", [image(2, 1)])]
    for request in running:
        eager.compute_logits(schedule(request, len(request.token_ids), blocks))
    for target, source in zip(replaying.pools.layers, eager.pools.layers, strict=True):
        target.keys.copy_(source.keys)
        target.values.copy_(source.values)
    steps = [("all", "qv"), ("", "text"), ("", ""), ("text", "text"), ("qv", "all"), ("all",)]
    for number, names in enumerate(steps):
        rows: list[Request] = running[: len(names)]
        for request, name in zip(rows, names, strict=True):
            request.token_ids.append(int(rng.integers(1, 700)))
            request.adapter = digests[name]
        batch = join([schedule(request, 1, blocks) for request in rows])
        actual, expected = replaying.compute_logits(batch), eager.compute_logits(batch)
        assert graphs.num_replays == number + 1
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
