"""Times decode steps with LoRA adapters against the same steps without, in turns, without a server.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=2 python bench/adapters.py --checkpoint m100 --dtype bfloat16
    python bench/adapters.py --sequences 16 --profile      # where the time goes

Four kinds of step, one after the other in every round:

    none        a runner that serves no adapters
    unused      a runner with `--adapters` slots, whose step uses none
    one         every sequence uses the same adapter
    several     `--adapters` different ones, in turns; as many as there are sequences at most

The adapters are random, of one rank, on all layers. Ratios are medians over the rounds of a kind's
time beside that of `none` in the same round. CPU seconds are of all threads of the process: they
count on a machine that is busy with other work, wall-clock seconds on a quiet one. The last line is
one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bounds import decode_work
from decode import BLOCK_SIZE, Level, Workload, profile
from engine_requests import open_runner
from processes import BUNDLED, arguments, numbers, print_document
from vlmserve.models.batch import AdapterRef, StepBatch
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.lora.files import CONFIG, WEIGHTS, digest_of
from vlmserve.models.lora.sites import linear_shapes
from vlmserve.models.weights.meta_model import empty_model

KINDS = ("none", "unused", "one", "several")


def parse_arguments() -> argparse.Namespace:
    return arguments(
        __doc__,
        checkpoint=BUNDLED,
        dtype="auto",
        lora_dtype="auto",
        sequences=("1,16", "comma-separated, of a decode step"),
        adapters=(8, "different adapters"),
        rank=16,
        context=(48, "tokens before the decoded token"),
        images=(False, "each sequence sees an image of all tiles"),
        rounds=21,
        steps=(5, "of a kind in a round"),
        profile=(False, "show the operators of each kind's steps"),
    )


def write_adapter(folder: Path, model: nn.Module, rank: int, seed: int) -> AdapterRef:
    """A random adapter on all linear layers but the head, as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_out, num_in) in linear_shapes(model).items():
        for matrix, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
            values = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            tensors[f"base_model.model.{name}.lora_{matrix}.weight"] = values.bfloat16()
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return AdapterRef(folder.name, str(folder), digest_of(folder))


def make_runner(args: argparse.Namespace, **settings: Any) -> ModelRunner:
    most = max(numbers(args.sequences))
    return open_runner(
        args.checkpoint,
        device="cpu",
        dtype=args.dtype,
        max_num_seqs=most,
        block_size=BLOCK_SIZE,
        num_text_blocks=most * -(-(args.context + 1) // BLOCK_SIZE),
        num_image_blocks=most * 4,
        **settings,
    )


def read_adapters(runner: ModelRunner, args: argparse.Namespace) -> list[str]:
    """The digests of the adapters, which the runner has read."""
    store, model = runner.adapters, empty_model(runner.config, torch.float32)
    assert store is not None, "adapters are served"
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.adapters):
            ref = write_adapter(Path(folder) / str(seed), model, args.rank, seed)
            store.read(ref)
            digests.append(ref.digest)
    return digests


def with_adapters(batch: StepBatch, digests: list[str]) -> StepBatch:
    """The same step, whose sequences use these adapters in turns."""
    turns = itertools.cycle(digests)
    return replace(batch, sequences=[replace(one, adapter=next(turns)) for one in batch.sequences])


def levels_of(
    runner: ModelRunner, args: argparse.Namespace, num_seqs: int, digests: list[str]
) -> dict[str, Level]:
    """The step of each kind."""
    keys = runner.info.max_num_tiles * runner.pools.num_patches if args.images else 0
    size = getattr(torch, runner.info.dtype).itemsize
    work = decode_work(runner.config.text_config, num_seqs, args.context + 1, keys, size)
    plain = Workload(runner).decode(num_seqs, args.context, bool(keys))
    batches = {
        "none": plain,
        "unused": plain,
        "one": with_adapters(plain, digests[:1]),
        "several": with_adapters(plain, digests),
    }
    return {kind: Level(kind, num_seqs, batches[kind], work) for kind in KINDS}


def measure(
    runners: dict[str, ModelRunner], levels: dict[str, Level], args: argparse.Namespace
) -> None:
    """Every kind's turn in every round, the first of them to warm up."""
    for number in range(args.rounds + 1):
        for kind, level in levels.items():
            level.take_turn(runners[kind], args.steps)
            if number == 0:
                level.wall_s.clear()
                level.cpu_s.clear()


def report(levels: dict[str, Level], steps: int) -> list[dict[str, object]]:
    """A row a kind, printed and returned."""
    rows: list[dict[str, object]] = []
    for kind, level in levels.items():
        wall, cpu = (1e3 * statistics.median(v) for v in (level.wall_s, level.cpu_s))
        base = levels["none"]
        by_wall = ratio(level.wall_s, base.wall_s, steps)
        by_cpu = ratio(level.cpu_s, base.cpu_s, steps)
        print(
            f"{kind:<10}{level.num_seqs:>5}{wall:>10.2f}{by_wall:>8.3f}{cpu:>10.2f}{by_cpu:>8.3f}"
        )
        figures = {"wall_ms": wall, "wall_ratio": by_wall, "cpu_ms": cpu, "cpu_ratio": by_cpu}
        rounded = {name: round(value, 4) for name, value in figures.items()}
        rows.append({"kind": kind, "sequences": level.num_seqs, **rounded})
    return rows


def ratio(times: list[float], base: list[float], steps: int) -> float:
    """The median over the rounds of a round's time beside that of the base."""
    rounds = (batched(one, steps) for one in (times, base))
    return statistics.median(
        statistics.median(own) / statistics.median(other)
        for own, other in zip(*rounds, strict=True)
    )


def batched(times: list[float], steps: int) -> list[list[float]]:
    """The times of each round."""
    return [times[begin : begin + steps] for begin in range(0, len(times), steps)]


def main() -> None:
    args = parse_arguments()
    without = make_runner(args)
    adapted = make_runner(
        args, max_loras=args.adapters, max_lora_rank=args.rank, lora_dtype=args.lora_dtype
    )
    digests = read_adapters(adapted, args)
    runners = {kind: without if kind == "none" else adapted for kind in KINDS}
    rows = []
    print(f"{'kind':<10}{'seqs':>5}{'wall ms':>10}{'ratio':>8}{'CPU ms':>10}{'ratio':>8}")
    for num_seqs in numbers(args.sequences):
        levels = levels_of(adapted, args, num_seqs, digests)
        if args.profile:
            for kind, level in levels.items():
                profile(runners[kind], [level])
        measure(runners, levels, args)
        rows += report(levels, args.steps)
    print_document(
        args,
        model=args.checkpoint or "bundled",
        dtype=adapted.info.dtype,
        threads=torch.get_num_threads(),
        levels=rows,
    )


if __name__ == "__main__":
    main()
