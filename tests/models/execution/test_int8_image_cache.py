"""The runner with images in int8: its answers against those with images in the compute type.

The bundled model in float32, by the exam's own pictures and questions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.oracle import (
    BLOCK_SIZE,
    Blocks,
    Request,
    checkpoint,
    join,
    loaded,
    prefill_logits,
    prompt,
    requests,
    schedule,
)
from support.taped import TapeRecorder, tape_operations, taped_backend
from transformers import PreTrainedTokenizerFast

from vlmserve.models.batch import PoolSizes, SamplingParams
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.bundled.dataset.data import IGNORE
from vlmserve.models.bundled.dataset.tokenizer import Encoder
from vlmserve.models.bundled.exam.exam import exam
from vlmserve.models.bundled.exam.grading import _decoded, row_of
from vlmserve.models.create_runner import create_runner
from vlmserve.models.decoder.decoder import FusedDecoder
from vlmserve.models.decoder.multi_device import SPLIT_ATTENTION_NAME
from vlmserve.models.decoder.operations import TritonOperations
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.paged_cache import POISON, poison_blocks, tile_bytes
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights import device_map
from vlmserve.models.weights.loader import load, load_model, open_checkpoint
from vlmserve.server.images.tiling import TilingConfig, cut

PLAN = PoolPlan(PoolSizes(200, 60, BLOCK_SIZE), 200)
INT8 = replace(PLAN, sizes=replace(PLAN.sizes, has_int8_images=True))
# measured: 0.017 and 0.0019; the logits have a standard deviation of 2.9
MAX_ERROR, MEAN_ERROR = 0.1, 0.005
BUDGET = 640 << 10


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_the_exams_answers_stay_and_their_logits_err_by_little() -> None:
    model = load_model(str(CHECKPOINT), "cpu", "float32")
    items = [item for item in exam(2, seed=5, shapes=(1, 3)) if item.picture is not None]
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(CHECKPOINT))
    tiling, num_right = TilingConfig.from_checkpoint(CHECKPOINT), []
    logits = []
    for plan in (PLAN, INT8):
        runner, right, found = ModelRunner(model, plan), 0, []
        for index, item in enumerate(items):
            row = row_of(item, encoder)
            request = Request(str(index), list(row.input_ids), [cut(_decoded(item), tiling)])
            rows = prefill_logits(runner, [request], chunk=1000)[str(index)]
            learned = torch.tensor(row.targets) != IGNORE
            found.append(rows[learned])
            right += int((rows.argmax(-1) == torch.tensor(row.targets))[learned].all())
        logits.append(torch.cat(found))
        num_right.append(right)
    errors = (logits[0] - logits[1]).abs()
    assert 0 < errors.mean() < MEAN_ERROR
    assert errors.max() < MAX_ERROR
    assert num_right[1] == num_right[0] > 0.9 * len(items)


def test_the_same_bytes_have_twice_the_images() -> None:
    """By the bytes of a tile: 1.97 times in bfloat16 with heads of 128, as in every Llama 3.2."""
    config = load_model(checkpoint("tiny"), "cpu", "float32").text_config
    sizes = []
    for dtype in ("auto", "int8"):
        settings = RunnerConfig(
            device="cpu",
            dtype="bfloat16",
            image_cache_dtype=dtype,
            max_model_len=256,
            max_num_seqs=64,
            kv_cache_bytes=BUDGET,
            num_threads=1,
        )
        runner = create_runner(checkpoint("tiny"), settings)
        cross = [runner.pools.layers[index] for index in runner.pools.cross_layers]
        one = tile_bytes(config, runner.pools.num_patches, torch.bfloat16, dtype == "int8")
        num_blocks = runner.info.pools.num_image_blocks
        assert sum(la.keys.nbytes + la.values.nbytes for la in cross) == num_blocks * one
        sizes.append((num_blocks, one))
    (num_plain, plain), (num_int8, int8) = sizes
    assert num_plain == BUDGET // 2 // plain
    assert num_int8 == BUDGET // 2 // int8
    published = type(config)()
    halves = [tile_bytes(published, 1601, torch.bfloat16, is_int8) for is_int8 in (False, True)]
    assert halves[0] / halves[1] == pytest.approx(256 / 130)


def test_only_tokens_that_see_an_image_change() -> None:
    int8 = ModelRunner(loaded("tiny"), INT8)
    plain = ModelRunner(loaded("tiny"), PLAN)
    names = ("one", "three", "text")
    found = prefill_logits(int8, requests(*names), chunk=3)
    expected = prefill_logits(plain, requests(*names), chunk=3)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], atol=0.02, rtol=0)
    assert torch.equal(found["text"], expected["text"])
    assert not torch.equal(found["three"], expected["three"])


@pytest.mark.parametrize("is_split", [False, True])
def test_layers_of_transformers_read_int8_through_the_cache_object(is_split: bool) -> None:
    opened = open_checkpoint(checkpoint("tiny"), torch.float32)
    place = device_map.on_one_device(opened.meta_model, torch.device("cpu"))
    model = load(opened, place, is_fused=False)
    if is_split:
        model.text_config._attn_implementation = SPLIT_ATTENTION_NAME
    unfused, fused = ModelRunner(model, INT8), ModelRunner(loaded("tiny"), INT8)
    if is_split:
        unfused._layer_devices = [torch.device("cpu"), torch.device("meta")]
    found = prefill_logits(unfused, requests("three"), chunk=3)["three"]
    expected = prefill_logits(fused, requests("three"), chunk=3)["three"]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_freed_blocks_in_int8_are_poisoned() -> None:
    runner = ModelRunner(loaded("tiny"), INT8)
    poison_blocks(runner.pools, [], [3])
    layer = runner.pools.layers[min(runner.pools.cross_layers)]
    num_patches = runner.pools.num_patches
    slots = torch.arange(3 * num_patches, 4 * num_patches)
    assert (layer.keys.gather(slots) > 0.99 * POISON).all()
    assert not layer.values.gather(slots - num_patches).any()


@pytest.mark.slow
def test_recorded_decode_steps_read_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = TapeRecorder()
    tape_operations(recorder, monkeypatch)
    eager = ModelRunner(loaded("tiny"), INT8)
    replaying = ModelRunner(loaded("tiny"), INT8, taped_backend(recorder, 16))
    replaying._fused = FusedDecoder(loaded("tiny").model.model.language_model, TritonOperations())
    graphs = replaying.record_graphs(2, recorder)
    running, blocks = [*requests("three"), prompt("t", "words")], Blocks(INT8.sizes, seed=3)
    for request in running:
        request.sampling = SamplingParams(temperature=0.0)
        batch = schedule(request, len(request.token_ids), blocks)
        expected = eager.compute_logits(batch)
        torch.testing.assert_close(replaying.compute_logits(batch), expected, atol=1e-4, rtol=0)
        request.token_ids.append(5)
    batch = join([schedule(request, 1, blocks) for request in running])
    expected = eager.compute_logits(batch)
    found = replaying.compute_logits(batch)
    assert graphs.num_replays == 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
