"""Any model, any mix: logits at every position against the oracle, through the true scheduler.

Hypothesis draws a Mllama (layers, cross layers, GQA ratio, RoPE, tile size, tiles), requests and a
schedule of arrivals and aborts. float32 on a CPU; every logit of every position that a step
computed, recomputed after preemption or not, lies within 5e-5 of the oracle's for that request
alone (they are of order 1). The oracle is transformers mended by models/decoder/mllama_fixes.py.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.oracle import GREEDY, Request, image, image_arguments, spans
from support.stepped import MAX_MODEL_LEN, SteppedEngine
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from vlmserve.bench.checkpoints import build
from vlmserve.models.batch import ImageTiles, ModelInfo, OnLaunch, PoolSizes, StepBatch, StepResult
from vlmserve.models.decoder.mllama_fixes import mend
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.loader import load_model
from vlmserve.router.messages import AddRequest

TOLERANCE = 5e-5
VOCAB_SIZE = 96
IMAGE_ID = VOCAB_SIZE
GRIDS = {
    1: [(1, 1)],
    2: [(1, 1), (1, 2), (2, 1)],
    4: [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)],
}


@dataclass
class Recorder:
    """A runner that keeps the logits of every position it computes."""

    inner: ModelRunner
    logits: dict[str, dict[int, list[Tensor]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    @property
    def info(self) -> ModelInfo:
        return self.inner.info

    def execute(self, batch: StepBatch, *on_launch: OnLaunch) -> StepResult:
        logits = self.inner.compute_logits(batch)
        rows = logits.split([len(sequence.token_ids) for sequence in batch.sequences])
        result = StepResult({})
        for sequence, part in zip(batch.sequences, rows, strict=True):
            for offset, row in enumerate(part):
                self.logits[sequence.request_id][sequence.start + offset].append(row)
            if sequence.sampling is not None:
                result.token_ids[sequence.request_id] = int(part[-1].argmax())
        return result


@st.composite
def configs(draw: st.DrawFn) -> MllamaConfig:
    """A small Mllama of any shape: every number that the runner's arithmetic depends on."""
    num_layers = draw(st.integers(2, 5))
    num_heads, num_kv_heads = draw(st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]))
    cross_layers = draw(st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers))
    max_num_tiles = draw(st.sampled_from(sorted(GRIDS)))
    taps = sorted(draw(st.sets(st.integers(0, 2), min_size=1)))
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if draw(st.booleans()):
        # Short enough that the positions of these tests are scaled.
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": num_heads * draw(st.sampled_from([8, 16])),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "cross_attention_layers": sorted(cross_layers),
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "rope_parameters": rope,
        "bos_token_id": 80,
        "eos_token_id": [81],
        "pad_token_id": 84,
    }
    vision = {
        "hidden_size": 32,
        "attention_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_global_layers": draw(st.integers(1, 2)),
        "image_size": draw(st.sampled_from([28, 42, 56])),
        "patch_size": 14,
        "max_num_tiles": max_num_tiles,
        "supported_aspect_ratios": [list(grid) for grid in GRIDS[max_num_tiles]],
        "intermediate_layers_indices": taps,
        "vision_output_dim": 32 * (1 + len(taps)),
        "initializer_range": 0.1,
    }
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)


@st.composite
def pictures(draw: st.DrawFn, config: MllamaConfig) -> ImageTiles:
    """One of a few pictures in any grid, so that some recur."""
    vision = config.vision_config
    grid = draw(st.integers(0, len(vision.supported_aspect_ratios) - 1))
    rows, columns = vision.supported_aspect_ratios[grid]
    return image(grid + 1, draw(st.integers(0, 3)), rows * columns, vision.image_size)


@st.composite
def prompts(draw: st.DrawFn, config: MllamaConfig, name: str) -> Request:
    """Text alone, or with one to four images: in front, adjacent or apart."""
    num_images = draw(st.sampled_from([0, 0, 1, 1, 2, 3, 4]))
    words = draw(st.lists(st.integers(0, 79), min_size=1, max_size=20))
    token_ids = list(words)
    for _ in range(num_images):
        token_ids.insert(draw(st.integers(0, len(token_ids))), IMAGE_ID)
    request = Request.__new__(Request)
    request.request_id, request.token_ids = name, token_ids
    request.images = [draw(pictures(config)) for _ in range(num_images)]
    request.spans = spans(token_ids, IMAGE_ID)
    return request


@dataclass
class Arrival:
    """A request, the step before which it comes, and the one before which it is aborted."""

    request: Request
    max_tokens: int
    at: int
    aborted_at: int | None


@st.composite
def mixes(draw: st.DrawFn) -> tuple[MllamaConfig, list[Arrival], PoolSizes, dict[str, int]]:
    """A model, requests for it, and the tight pools and steps that they share."""
    config = draw(configs())
    arrivals = []
    for number in range(draw(st.integers(2, 5))):
        request = draw(prompts(config, str(number)))
        at = draw(st.integers(0, 6))
        aborted_at = draw(st.none() | st.integers(at, at + 6))
        arrivals.append(Arrival(request, draw(st.integers(1, 8)), at, aborted_at))
    block_size = draw(st.sampled_from([2, 4, 8]))
    pools = PoolSizes(draw(st.integers(40, 72)) // block_size, 16, block_size)
    limits = {
        "max_num_seqs": draw(st.integers(2, 4)),
        "max_num_batched_tokens": draw(st.integers(4, 24)),
        "max_num_batched_images": draw(st.integers(1, 3)),
    }
    return config, arrivals, pools, limits


@contextmanager
def checkpoint(config: MllamaConfig, seed: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        build(config, folder, seed=seed, with_processor=False)
        yield folder


@torch.inference_mode()
def expected_logits(
    oracle: MllamaForConditionalGeneration, request: Request, token_ids: list[int]
) -> Tensor:
    """The oracle's logits for the whole sequence of a request, alone and uncached."""
    whole = Request.__new__(Request)
    whole.token_ids, whole.images, whole.spans = token_ids, request.images, request.spans
    images = image_arguments(whole, oracle.config.vision_config.max_num_tiles)
    output = oracle(input_ids=torch.tensor([token_ids]), use_cache=False, **images)
    return output.logits[0].float()


def run_mix(
    config: MllamaConfig, arrivals: list[Arrival], pools: PoolSizes, limits: dict[str, int]
) -> None:
    with checkpoint(config, seed=len(arrivals)) as folder:
        loaded = load_model(folder, "cpu", "float32")
        oracle = mend(MllamaForConditionalGeneration.from_pretrained(folder).eval())
    max_model_len = min(MAX_MODEL_LEN, pools.num_text_blocks * pools.block_size)
    recorder = Recorder(ModelRunner(loaded, PoolPlan(pools, max_model_len)))
    engine = SteppedEngine(recorder, limits | {"max_model_len": max_model_len})
    now = 0
    while now <= max(one.at for one in arrivals) or engine.scheduler.has_work:
        for one in arrivals:
            if one.at == now:
                engine.add(message(one))
            if one.aborted_at == now:
                engine.abort(one.request.request_id)
        engine.step()
        now += 1
        assert now < 2000, "the requests do not finish"
    engine.assert_all_free()
    for one in arrivals:
        assert_as_oracle(oracle, one, engine, recorder)


def message(one: Arrival) -> AddRequest:
    return AddRequest(
        request_id=one.request.request_id,
        prompt_token_ids=one.request.token_ids,
        images=one.request.images,
        spans=one.request.spans,
        sampling=GREEDY,
        max_tokens=one.max_tokens,
    )


def assert_as_oracle(
    oracle: MllamaForConditionalGeneration, one: Arrival, engine: SteppedEngine, recorder: Recorder
) -> None:
    name = one.request.request_id
    token_ids = engine.sequences[name].token_ids
    expected = expected_logits(oracle, one.request, token_ids)
    for position, rows in recorder.logits[name].items():
        for row in rows:
            torch.testing.assert_close(row, expected[position], atol=TOLERANCE, rtol=0.0)
    if one.aborted_at is None:
        # The first tokens may have come from another request's blocks, the last ones cannot.
        num_new = len(engine.generated(name))
        assert num_new == one.max_tokens
        assert set(range(len(one.request.token_ids) - 1, len(token_ids) - 1)) <= set(
            recorder.logits[name]
        )


seeded = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(mixes())
@settings(seeded, max_examples=6)
def test_every_logit_of_any_mix_on_any_model_is_the_oracles(mix) -> None:
    run_mix(*mix)


@pytest.mark.slow
@given(mixes())
@settings(seeded, max_examples=100, derandomize=False)
def test_every_logit_of_a_hundred_mixes_is_the_oracles(mix) -> None:
    run_mix(*mix)


@pytest.mark.torture
@given(mixes())
@settings(seeded, max_examples=1000, derandomize=False)
def test_every_logit_of_a_thousand_mixes_is_the_oracles(mix) -> None:
    run_mix(*mix)
