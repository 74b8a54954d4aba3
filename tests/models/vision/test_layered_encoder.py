"""An image that is encoded in parts: the same to the bit, whatever is computed in between."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.oracle import (
    PROMPTS,
    TINY_LAYOUTS,
    Blocks,
    checkpoint,
    image,
    join,
    prompt,
    runner,
    schedule,
)
from transformers import MllamaConfig

from vlmserve.bench.checkpoints import layout
from vlmserve.models.batch import ImageToEncode, StepBatch
from vlmserve.models.create_runner import create_runner
from vlmserve.models.errors import StepError
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.vision.image_cost import image_cost_tokens

# three local layers and a global one
NUM_LAYERS = 4


def in_parts(due: ImageToEncode, *ends: int) -> list[ImageToEncode]:
    """The same image, cut before the layers `ends`."""
    borders = [0, *ends, None]
    return [
        ImageToEncode(due.image, due.block_ids, begin or 0, end) for begin, end in pairwise(borders)
    ]


@pytest.mark.parametrize("name", TINY_LAYOUTS)
@pytest.mark.parametrize("ends", [(1,), (2,), (3,), (1, 2, 3)])
def test_an_image_in_parts_answers_as_one_in_a_pass(name: str, ends: tuple[int, ...]) -> None:
    model = runner(name)
    whole = schedule(PROMPTS["late"](), 19, Blocks(model.info.pools))
    expected = model.compute_logits(whole)
    others = Blocks(model.info.pools, seed=1)
    *first, last = in_parts(whole.images[0], *ends)
    for number, part in enumerate(first):
        text = prompt(f"text{number}", "words in between")
        beside = schedule(text, len(text.token_ids), others)
        model.compute_logits(StepBatch(beside.sequences, [part]))
    assert torch.equal(model.compute_logits(StepBatch(whole.sequences, [last])), expected)


def test_whole_images_share_a_step_with_the_end_of_another() -> None:
    model = runner("tiny")
    blocks = Blocks(model.info.pools)
    late, apart = PROMPTS["late"](), PROMPTS["apart"]()
    batches = [schedule(one, len(one.token_ids), blocks) for one in (late, apart)]
    expected = model.compute_logits(join(batches))
    first, last = in_parts(batches[0].images[0], 2)
    model.compute_logits(StepBatch(batches[1].sequences, [*batches[1].images, first]))
    joined = join(batches)
    joined.images = [last, *batches[1].images]
    torch.testing.assert_close(model.compute_logits(joined), expected, atol=1e-6, rtol=0.0)


def test_a_finished_part_needs_no_token_that_sees_it() -> None:
    """Text alone, beside an image whose blocks a later step reads."""
    for name in ("tiny", "cross-first"):
        model = runner(name)
        blocks = Blocks(model.info.pools)
        late, text = PROMPTS["late"](), PROMPTS["text"]()
        seeing, beside = (schedule(one, len(one.token_ids), blocks) for one in (late, text))
        expected = model.compute_logits(seeing)
        alone = model.compute_logits(beside)
        both = model.compute_logits(StepBatch(beside.sequences, seeing.images))
        assert torch.equal(both, alone)
        assert torch.equal(model.compute_logits(StepBatch(seeing.sequences)), expected)


def test_an_image_goes_on_only_where_the_last_part_ended() -> None:
    model = runner("tiny")
    batch = schedule(PROMPTS["late"](), 19, Blocks(model.info.pools))
    first, second, last = in_parts(batch.images[0], 1, 3)
    model.compute_logits(StepBatch(batch.sequences[:1], [first]))
    for wrong in (last, second):
        with pytest.raises(StepError, match="but no step stopped there"):
            model.compute_logits(StepBatch(batch.sequences, [wrong]))


def test_a_runner_tells_how_an_image_can_be_cut_and_what_it_costs() -> None:
    info = runner("tiny").info
    assert info.num_image_layers == NUM_LAYERS
    assert info.image_cost_tokens == image_cost_tokens(layout("tiny"))


def test_an_offloaded_vision_model_computes_as_a_whole(tmp_path) -> None:
    places = tmp_path / "map.json"
    places.write_text(json.dumps({"": "cpu", "model.vision_model": "disk"}))
    model = create_runner(
        str(checkpoint("tiny")), RunnerConfig(device="cpu", dtype="float32", device_map=str(places),
        max_model_len=64, num_text_blocks=16, num_image_blocks=8),
    )  # fmt: skip
    assert model.info.num_image_layers == 1
    batch = schedule(PROMPTS["late"](), 19, Blocks(model.info.pools))
    assert model.execute(batch).token_ids


def published(num_layers: int, hidden: int, inner: int, cross: list[int]) -> MllamaConfig:
    """A published text model's sizes beside the vision model that all of them share."""
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": 8,
        "cross_attention_layers": cross,
    }
    vision: dict[str, Any] = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "image_size": 560,
        "patch_size": 14,
        "max_num_tiles": 4,
        "vision_output_dim": 7680,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
    }
    return MllamaConfig(text_config=text, vision_config=vision)


def test_an_image_of_the_published_models_costs_less_than_a_full_chunk() -> None:
    """By hand: 10 teraflops of products and 8 of attention, over 17 gigaflops a token."""
    eleven = published(40, 4096, 14336, [3, 8, 13, 18, 23, 28, 33, 38])
    ninety = published(100, 8192, 28672, list(range(3, 100, 5)))
    assert 1000 < image_cost_tokens(eleven) < 1250
    assert 100 < image_cost_tokens(ninety) < 180
    assert image(1, 0).num_tiles == 1  # and costs the same: all are padded


def test_the_cost_follows_the_vision_models_share() -> None:
    assert image_cost_tokens(layout("m100")) < 50
    assert image_cost_tokens(layout("vision-heavy")) > 2048
