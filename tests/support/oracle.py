"""Requests for a ModelRunner as a test writes them, and the oracle's answer to the same.

Owns a hand-made scheduler of fixed chunks, and nothing of the router's. The oracle is transformers
mended in the two places of models/decoder/mllama_fixes.py.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import MllamaForConditionalGeneration
from transformers.utils import logging as transformers_logging

from vlmserve.bench.checkpoints import LAYOUTS, build
from vlmserve.models.batch import (
    CrossSegment,
    ImageSpan,
    ImageTiles,
    ImageToEncode,
    PoolSizes,
    SamplingParams,
    ScheduledSequence,
    StepBatch,
)
from vlmserve.models.decoder.int8.quantizer import Int8Weight
from vlmserve.models.decoder.mllama_fixes import mend
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.weights.loader import LoadedModel, load_model

transformers_logging.disable_progress_bar()

IMAGE_ID = 768
TILE_SIZE = 28
# tile grids by aspect_ratio_id, from 1, as transformers numbers them for four tiles
NUM_TILES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 2, 6: 4, 7: 3, 8: 4}
BLOCK_SIZE = 4
LARGE_LAYOUTS = ("m100", "vision-heavy", "wide")
TINY_LAYOUTS = [name for name in LAYOUTS if name not in LARGE_LAYOUTS]
GREEDY = SamplingParams(temperature=0.0)
EXCUSED_GAP = 1e-4
_DRAWING = threading.Lock()


def checkpoint(layout: str) -> str:
    """A folder with the random checkpoint of a layout, kept for the test run."""
    with _DRAWING:  # all threads draw from one generator
        return _drawn_checkpoint(layout)


@functools.cache
def _drawn_checkpoint(layout: str) -> str:
    folder = tempfile.mkdtemp(prefix=f"vlmserve-{layout}-")
    build(layout, folder, seed=1, with_processor=False)
    return folder


@functools.cache
def loaded(layout: str) -> LoadedModel:
    return load_model(checkpoint(layout), "cpu", "float32")


@functools.cache
def oracle(layout: str) -> MllamaForConditionalGeneration:
    """The mended transformers model of the same checkpoint, with SDPA of its own."""
    return mend(MllamaForConditionalGeneration.from_pretrained(checkpoint(layout)).eval())


def runner(layout: str, num_text_blocks: int = 200, num_image_blocks: int = 40) -> ModelRunner:
    """A runner on fresh pools of the shared model."""
    sizes = PoolSizes(num_text_blocks, num_image_blocks, BLOCK_SIZE)
    return ModelRunner(loaded(layout), PoolPlan(sizes, num_text_blocks * BLOCK_SIZE))


def image(
    aspect_ratio_id: int,
    seed: int,
    num_tiles: int | None = None,
    tile_size: int = TILE_SIZE,
) -> ImageTiles:
    """Random tiles in the grid of that id, by default of a model of up to four tiles."""
    num_tiles = NUM_TILES[aspect_ratio_id] if num_tiles is None else num_tiles
    shape = (num_tiles, 3, tile_size, tile_size)
    data = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8).tobytes()
    return ImageTiles(
        data=data,
        num_tiles=num_tiles,
        tile_size=tile_size,
        aspect_ratio_id=aspect_ratio_id,
        content_hash=seed.to_bytes(8, "big"),
    )


def spans(token_ids: Sequence[int], image_id: int = IMAGE_ID) -> list[ImageSpan]:
    """What Meta's mask lets see each image: until the next one that is not adjacent starts."""
    starts = [i for i, token_id in enumerate(token_ids) if token_id == image_id]
    found: list[ImageSpan] = []
    end = None
    for index in reversed(range(len(starts))):
        follower = starts[index + 1] if index + 1 < len(starts) else None
        if follower is not None and follower != starts[index] + 1:
            end = follower
        found.insert(0, ImageSpan(starts[index], end))
    return found


@dataclass
class Request:
    """A prompt with its images, the blocks it holds, and how far it has come."""

    request_id: str
    token_ids: list[int]
    images: list[ImageTiles] = field(default_factory=list)
    sampling: SamplingParams = GREEDY
    text_blocks: list[int] = field(default_factory=list)
    image_blocks: list[list[int]] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_prompt_tokens: int = 0
    spans: list[ImageSpan] = field(default_factory=list)
    adapter: str = ""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        self.spans = spans(self.token_ids)
        assert len(self.spans) == len(self.images)

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def visible(self, position: int) -> list[int]:
        """The indices of the images that the token at a position sees."""
        return [i for i, span in enumerate(self.spans) if span.covers(position)]


def prompt(request_id: str, text: str, images: Sequence[ImageTiles] = ()) -> Request:
    """A request whose text's bytes are its tokens, `|` standing for an image."""
    token_ids = [IMAGE_ID if c == "|" else 1 + ord(c) for c in text]
    return Request(request_id, token_ids, list(images))


PROMPTS: dict[str, Callable[[], Request]] = {
    "text": lambda: prompt("text", "only words, and a few more"),
    "short": lambda: prompt("short", "a"),
    "one": lambda: prompt("one", "|what is in it?", [image(2, 1)]),
    "late": lambda: prompt("late", "a question before |", [image(6, 2)]),
    "adjacent": lambda: prompt("adjacent", "see ||both", [image(1, 3), image(8, 4)]),
    "apart": lambda: prompt("apart", "|first then |second", [image(5, 5), image(3, 6)]),
    "three": lambda: prompt("three", "a||b|c d", [image(1, 7), image(4, 8), image(7, 9)]),
}


def requests(*names: str) -> list[Request]:
    """The prompts of those names; all of them without names."""
    return [PROMPTS[name]() for name in names or PROMPTS]


class Blocks:
    """Hands out block ids in a random order, so that no sequence's blocks lie together."""

    def __init__(self, sizes: PoolSizes, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.text = rng.permutation(sizes.num_text_blocks).tolist()
        self.image = rng.permutation(sizes.num_image_blocks).tolist()

    def reach(self, request: Request, num_tokens: int) -> None:
        while len(request.text_blocks) * BLOCK_SIZE < num_tokens:
            request.text_blocks.append(self.text.pop())


def schedule(request: Request, count: int, blocks: Blocks) -> StepBatch:
    """The next `count` tokens of one request, with the images that are due before them."""
    start, end = request.num_computed_tokens, request.num_computed_tokens + count
    blocks.reach(request, end)
    due = []
    for index in range(len(request.image_blocks), len(request.images)):
        if request.spans[index].start >= end:
            break
        tiles = request.images[index]
        request.image_blocks.append([blocks.image.pop() for _ in range(tiles.num_tiles)])
        due.append(ImageToEncode(tiles, request.image_blocks[index], adapter=request.adapter))
    is_last = end == len(request.token_ids)
    sequence = ScheduledSequence(
        request_id=request.request_id,
        token_ids=request.token_ids[start:end],
        start=start,
        block_ids=list(request.text_blocks),
        segments=list(_segments(request, start, end)),
        sampling=request.sampling if is_last else None,
        sample_index=len(request.generated),
        adapter=request.adapter,
    )
    request.num_computed_tokens = end
    return StepBatch(sequences=[sequence], images=due)


def _segments(request: Request, start: int, end: int) -> Iterator[CrossSegment]:
    current: CrossSegment | None = None
    for position in range(start, end):
        block_ids = [b for i in request.visible(position) for b in request.image_blocks[i]]
        if current is not None and current.block_ids == block_ids:
            current.num_tokens += 1
            continue
        if current is not None:
            yield current
        current = CrossSegment(1, block_ids)
    if current is not None:
        yield current


def join(batches: Sequence[StepBatch]) -> StepBatch:
    return StepBatch(
        sequences=[s for batch in batches for s in batch.sequences],
        images=[i for batch in batches for i in batch.images],
    )


def prefill_logits(
    model: ModelRunner, requests: Sequence[Request], chunk: int, seed: int = 0
) -> dict[str, Tensor]:
    """Logits at every prompt position, all requests run together in chunks of that many tokens."""
    blocks = Blocks(model.info.pools, seed)
    parts: dict[str, list[Tensor]] = {request.request_id: [] for request in requests}
    while True:
        running = [r for r in requests if r.num_computed_tokens < len(r.token_ids)]
        if not running:
            return {name: torch.cat(rows) for name, rows in parts.items()}
        counts = [min(chunk, len(r.token_ids) - r.num_computed_tokens) for r in running]
        batch = join([schedule(r, n, blocks) for r, n in zip(running, counts, strict=True)])
        rows = model.compute_logits(batch).split(counts)
        for request, part in zip(running, rows, strict=True):
            parts[request.request_id].append(part)


def generate(
    model: ModelRunner, requests: Sequence[Request], num_tokens: int, chunk: int, seed: int = 0
) -> None:
    """Append `num_tokens` sampled tokens to each request; request i joins at step i."""
    blocks = Blocks(model.info.pools, seed)
    step = 0
    while any(len(r.generated) < num_tokens for r in requests):
        running = [r for r in requests[: step + 1] if len(r.generated) < num_tokens]
        batches = [
            schedule(r, min(chunk, len(r.token_ids) - r.num_computed_tokens), blocks)
            for r in running
        ]
        result = model.execute(join(batches))
        for request in running:
            if request.request_id in result.token_ids:
                request.token_ids.append(result.token_ids[request.request_id])
        step += 1


def pixel_values(images: Sequence[ImageTiles], max_num_tiles: int = 4) -> Tensor:
    """What transformers' processor would hand on, [1, num_images, max_num_tiles, 3, s, s]."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)[:, None, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)[:, None, None]
    size = images[0].tile_size
    padded = np.zeros((1, len(images), max_num_tiles, 3, size, size), dtype=np.float32)
    for index, tiles in enumerate(images):
        values = np.frombuffer(tiles.data, dtype=np.uint8).reshape(-1, 3, size, size)
        scaled = (values.astype(np.float64) * 0.00392156862745098).astype(np.float32)
        padded[0, index, : tiles.num_tiles] = (scaled - mean) / std
    return torch.from_numpy(padded)


def image_arguments(request: Request, max_num_tiles: int = 4) -> dict[str, Tensor]:
    """The oracle's arguments for a request's images and who sees them; none without images."""
    if not request.images:
        return {}
    shape = (1, len(request.token_ids), len(request.images), max_num_tiles)
    mask = torch.zeros(shape, dtype=torch.int64)
    for position in range(len(request.token_ids)):
        for index in request.visible(position):
            mask[0, position, index, : request.images[index].num_tiles] = 1
    num_tiles = torch.tensor([[tiles.num_tiles for tiles in request.images]])
    return {
        "pixel_values": pixel_values(request.images, max_num_tiles),
        "aspect_ratio_ids": torch.tensor([[tiles.aspect_ratio_id for tiles in request.images]]),
        "aspect_ratio_mask": (torch.arange(max_num_tiles) < num_tiles[..., None]).long(),
        "cross_attention_mask": mask,
    }


@torch.inference_mode()
def oracle_logits(
    layout: str, request: Request, model: MllamaForConditionalGeneration | None = None
) -> Tensor:
    """The oracle's logits at every position of one request alone, [num_tokens, vocab_size].

    model: another oracle than the layout's.
    """
    input_ids = torch.tensor([request.token_ids])
    model = model or oracle(layout)
    output = model(input_ids=input_ids, use_cache=False, **image_arguments(request))
    return output.logits[0].float()


def count_excuses(
    layout: str,
    request: Request,
    generated: list[int],
    model: MllamaForConditionalGeneration | None = None,
) -> int:
    """0 if all tokens are the oracle's, 1 if the first other one is a near tie; else fails.

    model: another oracle than the layout's.
    """
    whole = prompt("whole", "x")
    whole.token_ids, whole.images = request.token_ids + generated, request.images
    whole.spans = request.spans
    logits = oracle_logits(layout, whole, model)[len(request.token_ids) - 1 : -1]
    for token_id, row in zip(generated, logits, strict=True):
        best = row.topk(2)
        if token_id != best.indices[0]:
            gap = float(best.values[0] - best.values[1])
            assert gap <= EXCUSED_GAP, f"{request.request_id}: {gap} apart"
            assert token_id == best.indices[1]
            return 1
    return 0


def dequantize(weight: Int8Weight) -> Tensor:
    """An int8 weight in the dtype of its scales, [out, in]."""
    return weight.codes.to(weight.scales.dtype) * weight.scales[:, None]


def random_request(rng: np.random.Generator, name: str, sampling: SamplingParams) -> Request:
    """A short prompt with none, one or two images, adjacent or apart; pictures recur."""
    num_images = int(rng.choice([0, 0, 1, 1, 2]))
    letters = list("abcdefgh"[: rng.integers(1, 9)]) + ["|"] * num_images
    text = "".join(rng.permutation(letters)) + "?"
    grids = [int(rng.integers(1, 9)) for _ in range(num_images)]
    request = prompt(name, text, [image(grid, grid) for grid in grids])
    request.sampling = sampling
    return request
