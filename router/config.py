"""The engine's settings, as the supervisor hands them to the engine process.

Owns names, defaults and ranges. Knows nothing of HTTP.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..models.batch import Positive


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine process.

    model: a local folder. device: "auto", "cpu", "cuda" or "cuda:N". dtype:
    "auto", "float32", "bfloat16" or "float16". max_model_len None takes the
    model's own context. kv_cache_bytes None sizes both pools from free memory.
    num_threads None takes the cores that HTTP and image decoding leave.
    """

    model: str
    socket_path: str
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 2048
    block_size: Positive = 16
    num_text_blocks: Positive | None = None
    num_image_blocks: Positive | None = None
    kv_cache_bytes: Positive | None = None
    max_queue_requests: Positive = 256
    max_queue_tokens: Positive = 1_048_576
    max_queue_bytes: Positive = 1_073_741_824
    heartbeat_interval_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    num_threads: Positive | None = None
