"""Times the model's steps alone, without a server, against what the machine could do at best.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=2 python bench/decode.py --checkpoint m100 --dtype bfloat16
    python bench/decode.py --profile          # the bundled model, where its time goes

A decode step gives every sequence one token, behind `--context` tokens of text, with and without
an image of all tiles. A prefill step takes as many prompts with one image each. Each level has its
turn in each round, and the machine's bound is measured in every round beside them; medians over the
rounds. The bound of a step is the slower of its products at the rate of a large product, and its
reads of weights and cached keys at the rate of a plain read or copy. The last line printed is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlmserve.models.bundled as bundled
from bounds import Machine, MachineProbe, Work, decode_work, prefill_work
from processes import machine
from vlmserve.models.batch import (
    CrossSegment,
    ImageTiles,
    ImageToEncode,
    SamplingParams,
    ScheduledSequence,
    StepBatch,
)
from vlmserve.models.create_runner import create_runner
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.settings.runner_config import RunnerConfig

BLOCK_SIZE = 16
GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class Level:
    """One kind of step: what it runs, what it must cost, and what it took."""

    kind: str
    num_seqs: int
    batch: StepBatch
    work: Work
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", default="", help="folder; default: the bundled model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sequences", default="1,4,16,64", help="comma-separated, of a decode")
    parser.add_argument("--prefills", default="1,16", help="comma-separated prompts; '' for none")
    parser.add_argument("--context", type=int, default=48, help="tokens before the decoded one")
    parser.add_argument("--prompt", type=int, default=17, help="tokens of a prefilled prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of a level in a round")
    parser.add_argument("--profile", action="store_true", help="operators of one step a level")
    return parser.parse_args()


class Workload:
    """Builds steps whose sequences have blocks of their own, one after the other in the pools."""

    def __init__(self, runner: ModelRunner, config: Any, seed: int = 0) -> None:
        self._info = runner.info
        self._vocab_size = config.text_config.vocab_size
        self._rng = np.random.default_rng(seed)

    def decode(self, num_seqs: int, context: int, has_image: bool) -> StepBatch:
        """The next token of num_seqs sequences; only timing cares what the blocks hold."""
        return StepBatch([self._sequence(i, context, 1, has_image) for i in range(num_seqs)])

    def prefill(self, num_seqs: int, prompt_len: int) -> StepBatch:
        """The prompts of num_seqs requests, each with an image to encode."""
        sequences = [self._sequence(i, 0, prompt_len, True) for i in range(num_seqs)]
        images = [ImageToEncode(self._image(), self._tiles(i)) for i in range(num_seqs)]
        return StepBatch(sequences, images)

    def _sequence(
        self, index: int, start: int, num_tokens: int, has_image: bool
    ) -> ScheduledSequence:
        num_blocks = -(-(start + num_tokens) // BLOCK_SIZE)
        first = index * num_blocks
        return ScheduledSequence(
            request_id=str(index),
            token_ids=self._rng.integers(0, self._vocab_size, num_tokens).tolist(),
            start=start,
            block_ids=list(range(first, first + num_blocks)),
            segments=[CrossSegment(num_tokens, self._tiles(index) if has_image else [])],
            sampling=GREEDY,
        )

    def _tiles(self, index: int) -> list[int]:
        count = self._info.max_num_tiles
        return list(range(index * count, (index + 1) * count))

    def _image(self) -> ImageTiles:
        count, size = self._info.max_num_tiles, self._info.tile_size
        data = self._rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8).tobytes()
        # the aspect ratio of 2 x 2 tiles has the id 6 where an image has at most four
        return ImageTiles(
            data=data, num_tiles=count, tile_size=size, aspect_ratio_id=6, content_hash=bytes(8)
        )


def make_levels(runner: ModelRunner, args: argparse.Namespace) -> list[Level]:
    config = runner.config
    itemsize = getattr(torch, runner.info.dtype).itemsize
    workload, num_tiles = Workload(runner, config), runner.info.max_num_tiles
    num_keys = num_tiles * runner.pools.num_patches
    levels = []
    for kind, seen in (("decode, text", 0), ("decode, image", num_keys)):
        for count in _numbers(args.sequences):
            work = decode_work(config.text_config, count, args.context + 1, seen, itemsize)
            batch = workload.decode(count, args.context, bool(seen))
            levels.append(Level(kind, count, batch, work))
    for count in _numbers(args.prefills):
        work = prefill_work(config, count, args.prompt, num_tiles, itemsize)
        levels.append(Level("prefill", count, workload.prefill(count, args.prompt), work))
    return levels


def make_runner(args: argparse.Namespace) -> ModelRunner:
    counts = _numbers(args.sequences) + _numbers(args.prefills)
    folder = args.checkpoint or str(Path(bundled.__file__).parent / "checkpoint")
    blocks = -(-(max(args.context, args.prompt) + 1) // BLOCK_SIZE)
    return create_runner(
        folder,
        RunnerConfig(
            device=args.device,
            dtype=args.dtype,
            max_num_seqs=max(counts),
            block_size=BLOCK_SIZE,
            num_text_blocks=max(counts) * blocks,
            num_image_blocks=max(counts) * 4,
        ),
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def measure(runner: ModelRunner, levels: list[Level], args: argparse.Namespace) -> Machine:
    """Every level's turn in every round; the median machine."""
    config = runner.config.text_config
    probe = MachineProbe(
        getattr(torch, runner.info.dtype),
        config.hidden_size,
        config.intermediate_size,
        int(max(level.work.num_bytes for level in levels)),
    )
    for level in levels:
        runner.execute(level.batch)
    machines = []
    for _ in range(args.rounds):
        machines.append(probe.measure())
        for level in levels:
            _take_turn(lambda level=level: runner.execute(level.batch), level, args.steps)
    return Machine(
        statistics.median(m.flops_per_s for m in machines),
        statistics.median(m.bytes_per_s for m in machines),
    )


def _take_turn(step: Callable[[], Any], level: Level, count: int) -> None:
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        level.wall_s.append(time.perf_counter() - wall)
        level.cpu_s.append(time.process_time() - cpu)


def report(levels: list[Level], reached: Machine) -> list[dict[str, object]]:
    """A row a level, printed and returned."""
    print(
        f"products {reached.flops_per_s / 1e9:.0f} GFLOP/s, "
        f"memory {reached.bytes_per_s / 1e9:.1f} GB/s"
    )
    print(f"{'step':<16}{'seqs':>5}{'wall ms':>10}{'CPU ms':>10}{'bound ms':>10}{'x bound':>9}")
    rows: list[dict[str, object]] = []
    for level in levels:
        wall, cpu = (1e3 * statistics.median(v) for v in (level.wall_s, level.cpu_s))
        bound = 1e3 * reached.bound_s(level.work)
        print(
            f"{level.kind:<16}{level.num_seqs:>5}{wall:>10.2f}{cpu:>10.2f}{bound:>10.2f}"
            f"{wall / bound:>9.2f}"
        )
        rows.append(
            {
                "step": level.kind,
                "sequences": level.num_seqs,
                "wall_ms": round(wall, 3),
                "cpu_ms": round(cpu, 3),
                "bound_ms": round(bound, 3),
                "times_bound": round(wall / bound, 3),
                "gflop": round(level.work.flops / 1e9, 4),
                "megabytes": round(level.work.num_bytes / 1e6, 3),
            }
        )
    return rows


def profile(runner: ModelRunner, levels: list[Level]) -> None:
    """The operators of five steps of each level, by their own CPU time."""
    for level in levels:
        runner.execute(level.batch)
        with torch.profiler.profile() as found:
            for _ in range(5):
                runner.execute(level.batch)
        print(f"{level.kind}, {level.num_seqs} sequences")
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    args = parse_arguments()
    runner = make_runner(args)
    levels = make_levels(runner, args)
    if args.profile:
        profile(runner, levels)
    reached = measure(runner, levels, args)
    rows = report(levels, reached)
    document = {
        "machine": machine(),
        "model": args.checkpoint or "bundled",
        "device": runner.info.device,
        "dtype": runner.info.dtype,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "steps_a_round": args.steps,
        "context": args.context,
        "prompt": args.prompt,
        "reached": asdict(reached),
        "levels": rows,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
