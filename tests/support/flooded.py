"""A scheduler that one owner floods, and requests of several owners."""

from __future__ import annotations

import zlib

from support.scheduler_bench import Bench

from vlmserve.models.batch import PoolSizes
from vlmserve.router.messages import AddRequest, OwnerPolicy


def request_of(name: str, owner: str, num_prompt=4, max_tokens=8, weight=1.0, **fields):
    fields.setdefault("policy", OwnerPolicy(weight=weight))
    # A different prompt for each request, so that no cached prefix changes the counts.
    prompt = [zlib.crc32(f"{name} {place}".encode()) % 900 for place in range(num_prompt)]
    return AddRequest(
        request_id=name, prompt_token_ids=prompt, max_tokens=max_tokens, owner=owner, **fields
    )


def flooded(**options) -> Bench:
    """A bench that one owner has flooded with 300 requests of 300 tokens, some steps ago."""
    bench = Bench(max_model_len=400, **options)
    for number in range(300):
        bench.add(request_of(f"flood {number}", "flooder", max_tokens=300))
    for _ in range(20):
        bench.step()
    return bench


PLACES = {"pools": PoolSizes(8192, 8, 4), "max_num_seqs": 16, "max_num_batched_tokens": 64}
# Ten of the flooder's answers fill the pool.
BLOCKS = {"pools": PoolSizes(300, 8, 4), "max_num_seqs": 64, "max_num_batched_tokens": 64}


def by_tokens(batch) -> float:
    """The seconds of a step on a machine where each token costs alike."""
    return batch.num_tokens * 0.001


def at_any_size(batch) -> float:
    """The same where a step takes as long with many tokens as with few."""
    return 0.001
