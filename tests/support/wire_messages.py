"""Messages of each kind on the engine's socket, for tests of the wire."""

from __future__ import annotations

from support.fake_runner import fake_image

from vlmserve.models.batch import ImageSpan, SamplingParams
from vlmserve.router.messages import (
    AbortRequests,
    AddRequest,
    EngineReady,
    EngineStats,
    Heartbeat,
    ImagePiece,
    NeedImage,
    RequestFailed,
    SequenceOutput,
    StepOutputs,
)

TO_ENGINE = [
    AddRequest(
        request_id="a",
        prompt_token_ids=[128000, 1],
        images=[fake_image("p", 4).ref],
        spans=[ImageSpan(1), ImageSpan(0, 1)],
        sampling=SamplingParams(temperature=0.5, top_p=0.9, top_k=5, seed=2**63),
        max_tokens=5,
        eos_token_ids=[3],
        stop_token_ids=[4],
        tenant="t",
    ),
    AbortRequests(["a", "b"]),
    ImagePiece(question=3, offset=65_536, data=bytes(100)),
]
FROM_ENGINE = [
    EngineReady(
        pid=1,
        max_model_len=2,
        vocab_size=3,
        max_num_seqs=4,
        device="cpu",
        dtype="float32",
        num_text_tokens=5,
        num_image_tiles=6,
    ),
    StepOutputs(outputs=[SequenceOutput(request_id="a", token_ids=[1], finish_reason="stop")]),
    NeedImage(question=3, request_id="a", content_hash=b"hash"),
    RequestFailed(request_id="a", kind="queue_full", message="full", retry_after_s=1.5),
    Heartbeat(stats=EngineStats(num_running=3, vision_seconds=0.5), step_age_s=0.25),
]
