"""The engine's settings, as the supervisor hands them to the engine process.

Owns names, defaults and ranges. Knows nothing of HTTP.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..models.batch import NonNegative, Positive
from .logs import LogFormat, LogLevel


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine process.

    model: a local folder. device: "auto", "cpu", "cuda" or "cuda:N". dtype:
    "auto", "float32", "bfloat16" or "float16". quantize: None, "int8", "bitsandbytes" or
    "bitsandbytes-nf4". device_map: "auto", "balanced" or a JSON file; max_memory: bytes
    by "0", "1", ... and "cpu"; both None put the model on one device. tensor_parallel_size:
    ranks that share the model, each a process on a GPU of its own, or on a share of the cores.
    replica: which of num_replicas engines of one server this is, each on devices of its own, or on
    a share of a CPU's cores and memory.
    max_model_len None takes the model's own context, or less where memory is short.
    max_num_batched_tokens and max_num_batched_images cap what one step computes.
    attention_backend: "auto", "sdpa", "flash_attn", "triton" or "varlen".
    block_size: tokens of a text block; None takes 16, or what the attention backend
    needs. cuda_graphs: record decode steps, where a GPU and the backend have it.
    kv_cache_bytes None sizes both pools from what weights and a step leave,
    of a GPU's memory the share gpu_memory_utilization.
    plan_ahead: prepare the next step while one is computed; None on CUDA only.
    prefix_cache and image_cache keep text and image blocks after use, until others
    need the room. num_threads None takes the cores that HTTP and image decoding leave.
    max_queue_wait_s: the longest time that a request may be expected to wait; None for any.
    poison_freed_blocks overwrites what nobody may read any more: for finding faults, it takes time.
    max_frame_bytes caps one message from a worker; a worker that leaves more than
    max_outgoing_bytes unread is dropped. parent_pid: the process whose end ends
    the engine, None for whoever started it.
    """

    model: str
    socket_path: str
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    device_map: str | None = None
    max_memory: dict[str, Positive] | None = None
    tensor_parallel_size: Positive = 1
    replica: NonNegative = 0
    num_replicas: Positive = 1
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 64
    max_num_batched_tokens: Positive = 2048
    max_num_batched_images: Positive = 4
    attention_backend: str = "auto"
    block_size: Positive | None = None
    cuda_graphs: bool = True
    num_text_blocks: Positive | None = None
    num_image_blocks: Positive | None = None
    kv_cache_bytes: Positive | None = None
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    plan_ahead: bool | None = None
    prefix_cache: bool = True
    image_cache: bool = True
    poison_freed_blocks: bool = False
    max_queue_requests: Positive = 256
    max_queue_tokens: Positive = 1_048_576
    max_queue_bytes: Positive = 1_073_741_824
    max_queue_wait_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_frame_bytes: Positive = 268_435_456
    max_outgoing_bytes: Positive = 16_777_216
    heartbeat_interval_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    num_threads: Positive | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    parent_pid: Positive | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, one line for the operator, where two settings do not fit together."""
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}, --max-num-seqs is "
                f"{self.max_num_seqs}: every running request needs a token of each step; raise "
                "the first or lower the second"
            )
        if self.num_replicas > 1 and (self.device_map or self.max_memory):
            raise ValueError(
                "--replicas puts each engine on devices of its own, --device-map and --max-memory "
                "spread one over several: leave one of them out"
            )

    def plans_ahead(self, device: str) -> bool:
        """Whether an engine whose model is on `device` plans ahead."""
        return device.startswith("cuda") if self.plan_ahead is None else self.plan_ahead

    @property
    def process_name(self) -> str:
        """The engine's name in the log."""
        return "engine" if self.num_replicas == 1 else f"engine{self.replica}"
