"""Steps that launch every variant of every kernel once, so that no request waits for a compiler.

Triton compiles a kernel when it is first launched with certain constants, in a third of a second
to a second, and over ranks all wait for it. Recorded decode steps launch theirs when they are
recorded; these are the others: chunks, mixed steps, and decodes without graphs. They write to the
first blocks of fresh pools, which nothing reads before it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..batch import (
    CrossSegment,
    ImageTiles,
    ImageToEncode,
    ModelInfo,
    SamplingParams,
    ScheduledSequence,
    StepBatch,
)
from .runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0)
# tokens of a step, one for each way to compute a quantized product: tiles of 16, 32 and 64 rows,
# several lines of them, and unpacked weights. The last also has more than 32 tiles of queries,
# whose keys are not cut.
STEP_TOKENS = (1, 20, 40, 100, 600)
# rows that see one tile each: too many for their keys to be cut
NUM_ROWS = 40


def warm_up(runner: ModelRunner, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Run the steps, of no more sequences and tokens than the limits. Returns how many."""
    batches = list(warm_up_batches(runner.info, max_num_seqs, max_num_batched_tokens))
    for batch in batches:
        runner.execute(batch)
    return len(batches)


def warm_up_batches(
    info: ModelInfo, max_num_seqs: int, max_num_batched_tokens: int
) -> Iterator[StepBatch]:
    """Chunks and decodes with a short and a long past; of text, and of rows that see images."""
    tiles = list(range(min(info.max_num_tiles, info.pools.num_image_blocks)))
    most = min(max_num_batched_tokens, info.max_model_len - 1)
    longest = info.max_model_len
    if len(tiles) == info.max_num_tiles:
        image = ImageToEncode(blank_image(info), tiles)
        first = _sequence(info, "new", min(2, most), min(2, most), tiles)
        yield StepBatch([first], images=[image])
    for num_tokens in dict.fromkeys(min(count, most) for count in STEP_TOKENS):
        for length in (num_tokens, longest):
            yield StepBatch([_sequence(info, "text", num_tokens, length)])
            yield StepBatch([_sequence(info, "seeing", num_tokens, length, tiles)])
    chunk = min(20, most - 1)
    if max_num_seqs > 1 and chunk > 0:
        # beside a chunk, so that no recorded step is used; one row of two sees an image
        for length in (1, longest):
            for seen in ((), tiles):
                rows = [
                    _sequence(info, "chunk", chunk, chunk),
                    _sequence(info, "row", 1, length, seen),
                ]
                yield StepBatch(rows)
    num_rows = min(NUM_ROWS, max_num_seqs, most)
    for seen in ((), tiles[:1]):
        rows = [_sequence(info, f"row-{row}", 1, 1, seen) for row in range(num_rows - 1)]
        num_tokens = 2 if num_rows < most else 1
        yield StepBatch([_sequence(info, "chunk", num_tokens, 2, seen), *rows])


def _sequence(
    info: ModelInfo, name: str, num_tokens: int, length: int, seen: Sequence[int] = ()
) -> ScheduledSequence:
    return probe_sequence(name, num_tokens, length, info.pools.block_size, seen, GREEDY)


def probe_sequence(
    name: str,
    num_tokens: int,
    length: int,
    block_size: int,
    seen: Sequence[int],
    sampling: SamplingParams,
) -> ScheduledSequence:
    """The last tokens of a sequence of that length, in the first block again and again.

    seen: the image blocks that its tokens see.
    """
    return ScheduledSequence(
        request_id=name,
        token_ids=[0] * num_tokens,
        start=length - num_tokens,
        block_ids=[0] * -(-length // block_size),
        segments=[CrossSegment(num_tokens, list(seen))],
        sampling=sampling,
        sample_index=0,
    )


def blank_image(info: ModelInfo) -> ImageTiles:
    """A black picture of the most tiles."""
    size = info.tile_size
    return ImageTiles(
        data=bytes(info.max_num_tiles * 3 * size * size),
        num_tiles=info.max_num_tiles,
        tile_size=size,
        aspect_ratio_id=1,
        content_hash=b"",
    )
