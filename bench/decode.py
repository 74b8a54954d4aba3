"""Times the model's steps alone, without a server, against what the machine could do at best.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=2 python bench/decode.py --checkpoint m100 --dtype bfloat16
    python bench/decode.py --profile          # the bundled model, where its time goes
    python bench/decode.py --checkpoint m100 --beside m100-fp8      # in turns, a quantized one

A decode step gives every sequence one token, behind `--context` tokens of text, with and without
an image of all tiles. A prefill step computes as many prompts with one image each. Each round runs
every level and measures the machine's bound beside them; figures are medians over the rounds. The
bound of a step is the slower of its products at the rate of a large product, and its reads of
weights and cached keys at the rate of a plain read or copy. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from bounds import Machine, MachineProbe, Work, decode_work, prefill_work
from engine_requests import GREEDY, open_runner, random_image
from processes import BUNDLED, arguments, numbers, print_document
from vlmserve.models.batch import CrossSegment, ImageToEncode, ScheduledSequence, StepBatch
from vlmserve.models.execution.runner import ModelRunner

BLOCK_SIZE = 16


def parse_arguments() -> argparse.Namespace:
    return arguments(
        __doc__,
        checkpoint=BUNDLED,
        beside=("", "a second checkpoint of the same model, such as a quantized one, in turns"),
        dtype="auto",
        device="auto",
        sequences=("1,4,16,64", "comma-separated, of a decode"),
        prefills=("1,16", "comma-separated prompts; '' for none"),
        context=(48, "tokens before the decoded token"),
        prompt=(17, "tokens of a prefilled prompt"),
        tiles=("", "comma-separated, of a prefilled prompt's image; default: all"),
        rounds=7,
        steps=(5, "of a level in a round"),
        profile=(False, "show the operators of a level's steps"),
    )


@dataclass(slots=True)
class Level:
    """One kind of step: its batch, its least work, and the seconds it took."""

    kind: str
    num_seqs: int
    batch: StepBatch
    work: Work
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def take_turn(self, runner: ModelRunner, count: int) -> None:
        """Run and time `count` steps."""
        for _ in range(count):
            wall, cpu = time.perf_counter(), time.process_time()
            runner.execute(self.batch)
            self.wall_s.append(time.perf_counter() - wall)
            self.cpu_s.append(time.process_time() - cpu)


class Workload:
    """Builds steps whose sequences have their own blocks, one after the other in the pools."""

    def __init__(self, runner: ModelRunner) -> None:
        self._info = runner.info
        self._vocab_size = runner.config.text_config.vocab_size
        self._rng = np.random.default_rng(0)

    def decode(self, num_seqs: int, context: int, has_image: bool) -> StepBatch:
        """The next token of num_seqs sequences; timing does not depend on the blocks' content."""
        return StepBatch([self._sequence(i, context, 1, has_image) for i in range(num_seqs)])

    def prefill(self, num_seqs: int, prompt_len: int, num_tiles: int) -> StepBatch:
        """The prompts of num_seqs requests, each with an image of num_tiles to encode."""
        images = [
            ImageToEncode(random_image(self._rng, self._info, num_tiles), tiles[:num_tiles])
            for tiles in map(self._tiles, range(num_seqs))
        ]
        return StepBatch([self._sequence(i, 0, prompt_len, True) for i in range(num_seqs)], images)

    def _sequence(self, index: int, start: int, count: int, has_image: bool) -> ScheduledSequence:
        num_blocks = -(-(start + count) // BLOCK_SIZE)
        return ScheduledSequence(
            request_id=str(index),
            token_ids=self._rng.integers(0, self._vocab_size, count).tolist(),
            start=start,
            block_ids=list(range(index * num_blocks, (index + 1) * num_blocks)),
            segments=[CrossSegment(count, self._tiles(index) if has_image else [])],
            sampling=GREEDY,
        )

    def _tiles(self, index: int) -> list[int]:
        count = self._info.max_num_tiles
        return list(range(index * count, (index + 1) * count))


def make_levels(runner: ModelRunner, args: argparse.Namespace) -> list[Level]:
    config, workload, num_tiles = runner.config, Workload(runner), runner.info.max_num_tiles
    itemsize = getattr(torch, runner.info.dtype).itemsize
    levels = []
    for kind, keys in (("text", 0), ("image", num_tiles * runner.pools.num_patches)):
        for count in numbers(args.sequences):
            work = decode_work(config.text_config, count, args.context + 1, keys, itemsize)
            batch = workload.decode(count, args.context, bool(keys))
            levels.append(Level(f"decode, {kind}", count, batch, work))
    for tiles in numbers(args.tiles) or [num_tiles]:
        kind = f"prefill, {tiles} tiles" if args.tiles else "prefill"
        for count in numbers(args.prefills):
            work = prefill_work(config, count, args.prompt, tiles, itemsize)
            levels.append(Level(kind, count, workload.prefill(count, args.prompt, tiles), work))
    return levels


def make_runner(args: argparse.Namespace, checkpoint: str) -> ModelRunner:
    most = max(numbers(args.sequences) + numbers(args.prefills))
    return open_runner(
        checkpoint,
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=most,
        block_size=BLOCK_SIZE,
        num_text_blocks=most * -(-(max(args.context, args.prompt) + 1) // BLOCK_SIZE),
        num_image_blocks=most * 4,
    )


# a checkpoint's runner and its levels
Run = tuple[ModelRunner, list[Level]]


def measure(runs: list[Run], args: argparse.Namespace) -> Machine:
    """Every level's turn in every round, of one checkpoint after the other; the median machine."""
    runner, levels = runs[0]
    config = runner.config.text_config
    num_bytes = int(max(level.work.num_bytes for level in levels))
    dtype = getattr(torch, runner.info.dtype)
    probe = MachineProbe(dtype, config.hidden_size, config.intermediate_size, num_bytes)
    machines = []
    turns = [(one, level) for steps in _side_by_side(runs) for one, level in steps]
    for one, level in turns:
        one.execute(level.batch)
    for _ in range(args.rounds):
        machines.append(probe.measure())
        for one, level in turns:
            level.take_turn(one, args.steps)
    return Machine(
        statistics.median(m.flops_per_s for m in machines),
        statistics.median(m.bytes_per_s for m in machines),
    )


def _side_by_side(runs: list[Run]) -> Iterator[list[tuple[ModelRunner, Level]]]:
    """The same level of every checkpoint."""
    for levels in zip(*(levels for _, levels in runs), strict=True):
        yield [(runner, level) for (runner, _), level in zip(runs, levels, strict=True)]


def report(levels: list[Level], reached: Machine) -> list[dict[str, object]]:
    """A row a level, printed and returned."""
    flops, read = reached.flops_per_s / 1e9, reached.bytes_per_s / 1e9
    print(f"products {flops:.0f} GFLOP/s, memory {read:.1f} GB/s")
    print(f"{'step':<16}{'seqs':>5}{'wall ms':>10}{'CPU ms':>10}{'bound ms':>10}{'x bound':>9}")
    rows: list[dict[str, object]] = []
    for level in levels:
        wall, cpu = (1e3 * statistics.median(v) for v in (level.wall_s, level.cpu_s))
        bound = 1e3 * reached.bound_s(level.work)
        times = f"{wall:>10.2f}{cpu:>10.2f}{bound:>10.2f}{wall / bound:>9.2f}"
        print(f"{level.kind:<16}{level.num_seqs:>5}{times}")
        figures = {"wall_ms": wall, "cpu_ms": cpu, "bound_ms": bound, "times_bound": wall / bound}
        work = {"gflop": level.work.flops / 1e9, "megabytes": level.work.num_bytes / 1e6}
        rounded = {name: round(value, 4) for name, value in (figures | work).items()}
        rows.append({"step": level.kind, "sequences": level.num_seqs, **rounded})
    return rows


def profile(runner: ModelRunner, levels: list[Level]) -> None:
    """The operators of five steps of each level, by their own CPU time."""
    for level in levels:
        runner.execute(level.batch)
        with torch.profiler.profile() as found:
            level.take_turn(runner, 5)
        level.wall_s, level.cpu_s = [], []
        print(f"{level.kind}, {level.num_seqs} sequences")
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    args = parse_arguments()
    names = [args.checkpoint, *([args.beside] if args.beside else [])]
    runners = [make_runner(args, name) for name in names]
    runs = [(runner, make_levels(runner, args)) for runner in runners]
    if args.profile:
        for runner, levels in runs:
            profile(runner, levels)
    reached = measure(runs, args)
    rows = {}
    for name, (_, levels) in zip(names, runs, strict=True):
        print(name or "bundled")
        rows[name or "bundled"] = report(levels, reached)
    print_document(
        args,
        model=args.checkpoint or "bundled",
        device=runners[0].info.device,
        dtype=runners[0].info.dtype,
        threads=torch.get_num_threads(),
        reached=asdict(reached),
        levels=rows[names[0] or "bundled"],
        beside=rows[names[1]] if args.beside else None,
    )


if __name__ == "__main__":
    main()
