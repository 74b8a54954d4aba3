"""Measures what drafts save and cost: tokens a second with and without, in turns in one process.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=2 python bench/drafts.py --checkpoint m100 --dtype bfloat16

The scheduler and the runner alone, without a server. Two tasks of greedy answers to random prompts:

    copies   drafts are the answer itself, known from a run before, of which `--wrong` are spoilt: a
             random checkpoint cannot copy from a prompt, so the share of right drafts is set here,
             not reached by prompt lookup; how many drafts a step has is the server's own choice
    free     prompt lookup as in the server; almost no draft is right, so this is what it costs

Medians over the rounds, and of the rounds' ratios. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine_requests import Loop, open_runner
from processes import BUNDLED, arguments, numbers, print_document
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.scheduler.drafts.draft_source import DraftSource
from vlmserve.router.scheduler.interface import DraftCounts, SchedulerLimits

TASKS = ("copies", "free")


def parse_arguments() -> argparse.Namespace:
    return arguments(
        __doc__,
        checkpoint=BUNDLED,
        dtype="auto",
        device="auto",
        concurrency="1,4,16",
        drafts=(8, "--num-speculative-tokens"),
        wrong=(0.1, "share of spoilt drafts of the task `copies`"),
        prompt=(48, "tokens of a prompt"),
        answer=(128, "tokens of an answer"),
        rounds=5,
    )


class KnownAnswer(DraftSource):
    """Drafts from an answer that is known already, some of them spoilt."""

    __slots__ = ("_answer", "_num_prompt", "_rng", "_wrong")

    def __init__(self, answer: list[int], args: argparse.Namespace, vocab_size: int) -> None:
        super().__init__(args.drafts, vocab_size)
        self._answer, self._num_prompt, self._wrong = answer, args.prompt, args.wrong
        self._rng = np.random.default_rng(0)

    def _from_text(self, token_ids: Sequence[int], most: int) -> list[int]:
        self._index.catch_up(token_ids)  # as prompt lookup does
        place = len(token_ids) - self._num_prompt
        drafts = self._answer[place : place + min(most, self._length.take())]
        return [one ^ int(self._rng.random() < self._wrong) for one in drafts]


@dataclass(slots=True)
class Runs:
    """Tokens a wall-clock second and a CPU second, one a round, and the drafts of the last."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    counts: DraftCounts = field(default_factory=DraftCounts)
    num_steps: int = 0

    def take(self, loop: Loop, num_tokens: int) -> None:
        """Run all requests of a loop to their ends."""
        wall, cpu, num_steps = time.perf_counter(), time.process_time(), 0
        while (batch := loop.scheduler.schedule()) is not None:
            loop.scheduler.update(loop.runner.execute(batch))
            num_steps += 1
        self.wall.append(num_tokens / (time.perf_counter() - wall))
        self.cpu.append(num_tokens / (time.process_time() - cpu))
        self.counts, self.num_steps = loop.scheduler.counts().drafts, num_steps


def loop_of(runner: ModelRunner, args: argparse.Namespace, num_seqs: int, num_drafts: int) -> Loop:
    """The same requests each time, so that both ways compute the same answers."""
    limits = SchedulerLimits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=2048,
        max_num_batched_images=1,
        max_model_len=runner.info.max_model_len,
        prefix_cache=False,
        num_speculative_tokens=num_drafts,
    )
    loop = Loop(runner, limits, np.random.default_rng(0))
    for number in range(num_seqs):
        loop.add(str(number), args.prompt, args.answer)
    return loop


def answers_of(loop: Loop, num_prompt: int) -> dict[str, list[int]]:
    """Run a loop to its end; the answers by sequence."""
    batch = loop.plan()
    loop.scheduler.update(loop.runner.execute(batch))
    sequences = loop.scheduler.take_started()
    Runs().take(loop, 0)
    return {one.sequence_id: one.token_ids[num_prompt:] for one in sequences}


def measure(
    runner: ModelRunner, args: argparse.Namespace, num_seqs: int, task: str
) -> dict[str, float]:
    """Runs with and without drafts alternate; each round starts with the other of the two."""
    answers = answers_of(loop_of(runner, args, num_seqs, 0), args.prompt)
    runs = {0: Runs(), args.drafts: Runs()}
    for number in range(args.rounds):
        for num_drafts in sorted(runs, reverse=bool(number % 2)):
            loop = loop_of(runner, args, num_seqs, num_drafts)
            # The prompts are computed before the clock starts.
            loop.scheduler.update(loop.runner.execute(loop.plan()))
            for sequence in loop.scheduler.take_started() if num_drafts else ():
                if task == "copies":
                    answer = answers[sequence.sequence_id]
                    sequence.drafts = KnownAnswer(answer, args, runner.info.vocab_size)
            runs[num_drafts].take(loop, num_seqs * (args.answer - 1))
    return figures(runs[0], runs[args.drafts])


def figures(plain: Runs, drafted: Runs) -> dict[str, float]:
    """Medians, ratios of drafts over none, and the share of drafts that were right."""
    pairs = {"wall": (plain.wall, drafted.wall), "cpu": (plain.cpu, drafted.cpu)}
    ratios = {
        f"{name}_ratio": round(statistics.median(b / a for a, b in zip(*both, strict=True)), 3)
        for name, both in pairs.items()
    }
    counts = drafted.counts
    return {
        "tokens_per_s": round(statistics.median(plain.wall), 1),
        "tokens_per_s_with_drafts": round(statistics.median(drafted.wall), 1),
        **ratios,
        "steps": plain.num_steps,
        "steps_with_drafts": drafted.num_steps,
        "drafts": counts.num_tokens,
        "right": round(counts.num_accepted / max(1, counts.num_tokens), 3),
    }


def main() -> None:
    args = parse_arguments()
    runner = open_runner(args.checkpoint, dtype=args.dtype, device=args.device)
    found = {}
    for task in TASKS:
        for num_seqs in numbers(args.concurrency):
            row = found[f"{task}/{num_seqs}"] = measure(runner, args, num_seqs, task)
            print(f"{task:<8} {num_seqs:>3} at once", row, flush=True)
    print_document(args, results=found)


if __name__ == "__main__":
    main()
