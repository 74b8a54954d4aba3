"""The runner against the oracle: transformers with models/decoder/mllama_fixes.py.

float32 on a CPU, logits at EVERY position within 2e-5 of the oracle's (they are of order 1), on
random checkpoints with all gates at 0.7.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.oracle import (
    PROMPTS,
    TILE_SIZE,
    TINY_LAYOUTS,
    Blocks,
    Request,
    checkpoint,
    generate,
    image,
    image_arguments,
    join,
    loaded,
    oracle,
    oracle_logits,
    prefill_logits,
    prompt,
    requests,
    runner,
    schedule,
)
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from vlmserve.models.batch import ImageTiles, PoolSizes, SamplingParams, StepBatch
from vlmserve.models.errors import NonFiniteLogitsError, StepError
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.vision.encoder import VisionEncoder
from vlmserve.models.weights.loader import load_model

TOLERANCE = 2e-5


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_as_oracle(layout: str, request: Request, logits: Tensor) -> None:
    expected = oracle_logits(layout, request)[: len(logits)]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0.0)


def assert_greedy_as_oracle(layout: str, request: Request) -> None:
    """Each generated token is the oracle's best after what stands before it."""
    expected = oracle_logits(layout, request)[request.num_prompt_tokens - 1 : -1].argmax(-1)
    assert request.generated == expected.tolist()


@pytest.mark.parametrize("layout", TINY_LAYOUTS)
@pytest.mark.parametrize("name", PROMPTS)
def test_logits_of_one_request_alone_equal_the_oracle_at_every_position(
    layout: str, name: str
) -> None:
    logits = prefill_logits(runner(layout), requests(name), chunk=1000)
    assert_as_oracle(layout, PROMPTS[name](), logits[name])


@pytest.mark.parametrize("layout", TINY_LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_logits_of_a_mixed_batch_in_chunks_equal_the_oracle_at_every_position(
    layout: str, chunk: int
) -> None:
    batch = requests()
    logits = prefill_logits(runner(layout), batch, chunk)
    for request in batch:
        assert_as_oracle(layout, request, logits[request.request_id])


@pytest.mark.parametrize("seed", range(6))
def test_random_prompts_in_random_company_equal_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = []
    for number in range(5):
        text = "".join(rng.choice(list("abc|"), p=[0.3, 0.3, 0.25, 0.15], size=rng.integers(1, 24)))
        images = [image(int(rng.integers(1, 9)), 100 * number + i) for i in range(text.count("|"))]
        batch.append(prompt(str(number), text, images))
    logits = prefill_logits(runner("tiny", 200, 120), batch, int(rng.integers(2, 9)), seed)
    for request in batch:
        assert_as_oracle("tiny", request, logits[request.request_id])


@pytest.mark.parametrize("layout", TINY_LAYOUTS)
def test_greedy_tokens_of_requests_that_join_one_by_one_equal_the_oracle(layout: str) -> None:
    batch = requests()
    generate(runner(layout), batch, num_tokens=12, chunk=5)
    for request in batch:
        assert_greedy_as_oracle(layout, request)


def test_cached_generation_of_the_oracle_itself_gives_the_same_tokens() -> None:
    """Generated tokens see what the prompt's last token saw: as `generate()` repeats the mask."""
    for request in requests("text", "one", "adjacent"):
        generate(runner("tiny"), [request], num_tokens=10, chunk=1000)
        alone = PROMPTS[request.request_id]()
        ids = oracle("tiny").generate(
            input_ids=torch.tensor([alone.token_ids]),
            **image_arguments(alone),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
        )
        assert request.token_ids == ids[0].tolist()


def test_a_text_only_row_is_the_same_alone_and_beside_images() -> None:
    alone = prefill_logits(runner("tiny"), requests("text"), 1000)["text"]
    beside = prefill_logits(runner("tiny"), requests(), 1000)["text"]
    torch.testing.assert_close(beside, alone, atol=TOLERANCE, rtol=0.0)


def test_tokens_before_the_first_image_do_not_depend_on_it() -> None:
    text = "a question before |and after"
    one, other = (
        prefill_logits(runner("tiny"), [prompt("r", text, [image(grid, seed)])], 1000)["r"]
        for grid, seed in ((1, 1), (6, 2))
    )
    at = text.index("|")
    torch.testing.assert_close(one[:at], other[:at], atol=TOLERANCE, rtol=0.0)
    assert ((one[at:] - other[at:]).abs().amax(dim=-1) > 1e-2).all()


def test_every_image_counts_after_its_span_has_begun() -> None:
    """Servers that kept only a request's last image were wrong in silence."""
    for changed in range(2):
        pictures = [image(2, 1), image(2, 2)]
        before = prefill_logits(runner("tiny"), [prompt("r", "||ab", pictures)], 1000)["r"][-1]
        pictures[changed] = image(2, 77)
        after = prefill_logits(runner("tiny"), [prompt("r", "||ab", pictures)], 1000)["r"][-1]
        assert (before - after).abs().max() > 1e-2


def test_slots_that_no_request_owns_are_never_read() -> None:
    """Freed and foreign blocks hold NaN here, and nothing changes."""
    model, batch = runner("tiny"), requests()
    for layer in model.pools.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    logits = prefill_logits(model, batch, chunk=4)
    for request in batch:
        assert_as_oracle("tiny", request, logits[request.request_id])


def test_two_sequences_share_one_image_encoded_once() -> None:
    model = runner("tiny")
    first, second = PROMPTS["one"](), PROMPTS["one"]()
    second.request_id = "two"
    blocks = Blocks(model.info.pools)
    batch = schedule(first, len(first.token_ids), blocks)
    second.image_blocks = first.image_blocks
    shared = join([batch, schedule(second, len(second.token_ids), blocks)])
    assert len(shared.images) == 1
    for part in model.compute_logits(shared).chunk(2):
        assert_as_oracle("tiny", first, part)


def test_an_image_encoded_a_step_before_its_tokens_is_kept() -> None:
    """A step may hold images and no token that sees one."""
    model = runner("tiny")
    blocks, late, text = Blocks(model.info.pools), PROMPTS["late"](), PROMPTS["text"]()
    early = schedule(late, 18, blocks)
    assert not early.images
    rest = schedule(late, 1, blocks)
    early.images, rest.images = rest.images, []
    with_text = join([early, schedule(text, len(text.token_ids), blocks)])
    logits = model.compute_logits(with_text)
    assert_as_oracle("tiny", text, logits[18:])
    torch.testing.assert_close(
        torch.cat([logits[:18], model.compute_logits(rest)]),
        oracle_logits("tiny", late),
        atol=TOLERANCE,
        rtol=0.0,
    )


def test_execute_samples_only_what_is_due() -> None:
    model = runner("tiny")
    blocks = Blocks(model.info.pools)
    whole, part = PROMPTS["text"](), PROMPTS["one"]()
    batch = join([schedule(whole, len(whole.token_ids), blocks), schedule(part, 3, blocks)])
    result = model.execute(batch)
    assert list(result.token_ids) == ["text"]
    assert result.vision_seconds > 0
    assert model.execute(schedule(part, 1, blocks)).token_ids == {}


def test_a_seeded_request_draws_the_same_tokens_in_any_company() -> None:
    def tokens(company: list[Request], chunk: int) -> list[int]:
        request = PROMPTS["one"]()
        request.sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=7)
        generate(runner("tiny"), [*company, request], num_tokens=10, chunk=chunk)
        return request.generated

    assert tokens([], 1000) == tokens(requests("text", "late", "apart"), 3)


def test_a_recomputed_sequence_goes_on_as_if_never_preempted() -> None:
    request, model = PROMPTS["apart"](), runner("tiny")
    generate(model, [request], num_tokens=6, chunk=1000)
    kept = request.generated
    request.text_blocks, request.image_blocks, request.num_computed_tokens = [], [], 0
    del request.token_ids[-3:]
    generate(model, [request], num_tokens=6, chunk=4, seed=9)
    assert request.generated == kept


def test_info_tells_what_the_router_must_know() -> None:
    info = runner("tiny").info
    assert (info.vocab_size, info.max_num_tiles, info.tile_size) == (768, 4, TILE_SIZE)
    assert (info.device, info.dtype, info.max_model_len) == ("cpu", "float32", 800)
    assert info.pools == PoolSizes(200, 40, 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_ids", [5, 900], "token id 900"),
        ("token_ids", [-1], "token id -1"),
        ("block_ids", [200], "text block 200"),
    ],
)
def test_an_id_outside_its_table_fails_the_step_and_names_it(
    field: str, value: list[int], message: str
) -> None:
    model, request = runner("tiny"), PROMPTS["short"]()
    batch = schedule(request, 1, Blocks(model.info.pools))
    setattr(batch.sequences[0], field, value)
    with pytest.raises(StepError, match=message):
        model.execute(batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_size": 56}, "tiles have 28"),
        ({"data": b"short"}, "5 bytes"),
        ({"aspect_ratio_id": 9}, "aspect_ratio_id 9"),
    ],
)
def test_an_image_that_does_not_fit_the_model_fails_the_step(
    changes: dict[str, object], message: str
) -> None:
    model, request = runner("tiny"), PROMPTS["one"]()
    tiles = request.images[0]
    fields = {name: getattr(tiles, name) for name in tiles.__struct_fields__}
    request.images = [ImageTiles(**(fields | changes))]
    batch = schedule(request, len(request.token_ids), Blocks(model.info.pools))
    with pytest.raises(StepError, match=message):
        model.execute(batch)


def test_a_step_without_sequences_is_refused() -> None:
    with pytest.raises(StepError, match="no sequence"):
        runner("tiny").execute(StepBatch())


def test_logits_that_are_not_numbers_fail_the_step() -> None:
    model, request = runner("tiny"), PROMPTS["text"]()
    blocks = Blocks(model.info.pools)
    model.compute_logits(schedule(request, 8, blocks))
    for layer in model.pools.layers:
        layer.keys.fill_(float("nan"))
    with pytest.raises(NonFiniteLogitsError, match="rows \\[0\\] of 1"):
        model.execute(schedule(request, len(request.token_ids) - 8, blocks))


def test_the_runner_computes_in_bfloat16() -> None:
    """bfloat16 keeps 8 bits: logits of order 1 agree to 0.1, and mostly in the best token."""
    model = ModelRunner(
        load_model(checkpoint("tiny"), "cpu", "bfloat16"), PoolPlan(PoolSizes(200, 40, 4), 800)
    )
    assert model.info.dtype == "bfloat16"
    batch = requests()
    logits = prefill_logits(model, batch, chunk=5)
    for request in batch:
        expected = oracle_logits("tiny", request)
        assert (logits[request.request_id] - expected).abs().max() < 0.15


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_pixel_values_equal_transformers_processor_bit_for_bit(grid: tuple[int, int]) -> None:
    high, wide = grid
    shape = (high * TILE_SIZE, wide * TILE_SIZE, 3)
    picture = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
    normalization = loaded("tiny").normalization
    processor = MllamaImageProcessorPil(
        size={"height": TILE_SIZE, "width": TILE_SIZE},
        image_mean=list(normalization.mean),
        image_std=list(normalization.std),
    )
    expected = processor(picture, return_tensors="pt")
    tiles = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")
    num_tiles = high * wide
    cut = ImageTiles(
        data=tiles["pixel_values"][0, 0, :num_tiles].astype(np.uint8).tobytes(),
        num_tiles=num_tiles,
        tile_size=TILE_SIZE,
        aspect_ratio_id=int(expected["aspect_ratio_ids"][0, 0]),
        content_hash=b"",
    )
    encoder = VisionEncoder(loaded("tiny").model, normalization, torch.device("cpu"))
    assert torch.equal(encoder.pixel_values([cut]), expected["pixel_values"][:, 0])
