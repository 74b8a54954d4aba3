"""Random mixes of eight adapters and none on pools too small for them, against the merged models.

The true scheduler over the true runner, stepped by hand, so that a seed fixes every step. Texts and
pictures, both caches on, clients that leave, and adapters that are read when a request first needs
them and unloaded between two. float32, tiny checkpoint; a greedy token other than the merged
model's is excused only where its two best logits lie within 1e-4.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from support.adapters import MIXED
from support.oracle import GREEDY, Request, count_excuses, image, loaded, prompt
from support.soak import merged
from support.stepped import MAX_MODEL_LEN, SteppedEngine

from vlmserve.models.batch import AdapterRef, PoolSizes
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.lora.limits import AdapterLimits
from vlmserve.router.messages import AddRequest

LAYOUT = "tiny"
POOLS = PoolSizes(num_text_blocks=16, num_image_blocks=12, block_size=4)
NUM_REQUESTS, MAX_LORAS = 22, 3


@dataclass
class Mix:
    """A seeded load on one engine, and what happened to it."""

    seed: int
    refs: dict[str, AdapterRef]
    counts: Counter[str] = field(default_factory=Counter)
    requests: dict[str, Request] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        limits = AdapterLimits(MAX_LORAS, 16, torch.float32)
        self.runner = ModelRunner(loaded(LAYOUT), PoolPlan(POOLS, MAX_MODEL_LEN), None, limits)
        self.engine = SteppedEngine(self.runner, {"max_loras": MAX_LORAS})
        self._in_memory: set[str] = set()
        # each adapter and none at least once
        each = ["", *MIXED]
        more = self.rng.choice(each, NUM_REQUESTS - len(each))
        self._names = [str(name) for name in self.rng.permutation([*each, *more])]

    def run(self) -> None:
        """Send all requests, a few at a time, until every one has ended."""
        while len(self.requests) < NUM_REQUESTS or self.engine.scheduler.has_work:
            for _ in range(int(self.rng.integers(0, 4))):
                if len(self.requests) < NUM_REQUESTS:
                    self._add(str(len(self.requests)))
            self._cancel_one()
            self._unload_one()
            self.engine.step()
        self.engine.assert_all_free()

    def num_excuses(self) -> int:
        """Compare every answer with its merged model's; see `count_excuses`."""
        return sum(
            count_excuses(
                LAYOUT,
                request,
                self.engine.generated(request_id),
                merged(self.names[request_id]) if self.names[request_id] else None,
            )
            for request_id, request in self.requests.items()
        )

    def _add(self, request_id: str) -> None:
        rng = self.rng
        name = self._names[len(self.requests)]
        num_images = int(rng.choice([0, 0, 1, 1, 2]))
        letters = [*"abcdefgh"[: rng.integers(1, 6)], *["|"] * num_images]
        text = "same start " * int(rng.integers(0, 2)) + "".join(rng.permutation(letters)) + "?"
        grids = [int(rng.integers(1, 5)) for _ in range(num_images)]
        request = prompt(request_id, text, [image(grid, grid) for grid in grids])
        self.requests[request_id], self.names[request_id] = request, name
        self.engine.add(
            AddRequest(
                request_id=request_id,
                prompt_token_ids=request.token_ids,
                images=request.images,
                spans=request.spans,
                sampling=GREEDY,
                max_tokens=int(rng.integers(4, 24)),
                adapter=self.refs[name] if name else None,
            )
        )
        if name:
            self._read(request_id, self.refs[name])

    def _read(self, request_id: str, ref: AdapterRef) -> None:
        assert self.runner.adapters is not None
        self.counts["reads"] += ref.digest not in self._in_memory
        self._in_memory.add(ref.digest)
        info = self.runner.adapters.read(ref)
        self.engine.scheduler.make_ready(self.engine.sequences[request_id], info)

    def _open(self) -> list[str]:
        snapshot = self.engine.scheduler.snapshot()
        return [*snapshot.waiting, *snapshot.running]

    def _cancel_one(self) -> None:
        """Now and then a client leaves, while its answer is computed."""
        if (running := self.engine.scheduler.snapshot().running) and self.rng.random() < 0.06:
            self.engine.abort(str(self.rng.choice(sorted(running))))
            self.counts["cancels"] += 1

    def _unload_one(self) -> None:
        """Now and then an adapter that no request uses is unloaded."""
        used = {self.names[request_id] for request_id in self._open()}
        unused = [
            ref
            for name, ref in self.refs.items()
            if name not in used and ref.digest in self._in_memory
        ]
        if unused and self.rng.random() < 0.3:
            assert self.runner.adapters is not None
            ref = unused[self.rng.integers(len(unused))]
            self.runner.adapters.forget(ref.digest)
            self._in_memory.remove(ref.digest)
            self.counts["unloads"] += 1


@pytest.mark.parametrize(
    "seed", [12, *(pytest.param(one, marks=pytest.mark.slow) for one in (19, 27))]
)
def test_a_random_mix_of_adapters_answers_as_the_merged_models(refs, seed):
    mix = Mix(seed, refs)
    mix.run()
    snapshot = mix.engine.scheduler.snapshot()
    assert set(mix.names.values()) == {"", *MIXED}
    assert mix.counts["cancels"] > 0
    assert mix.counts["unloads"] > 0
    assert mix.counts["reads"] > len(MIXED), "no adapter was unloaded and read again"
    assert snapshot.num_preemptions > 0, "the pools are too large to test preemption"
    assert snapshot.images.num_hits > 0
    assert snapshot.prefix_tokens_hit > 0
    assert mix.runner.adapters.num_loads > len(MIXED), "no adapter left its slot"
    assert mix.num_excuses() <= 1
