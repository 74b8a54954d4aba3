"""Measures what drafts save and cost: tokens a second with and without, in turns in one process.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=2 python bench/drafts.py --checkpoint m100 --dtype bfloat16

The scheduler and the runner alone, without a server. Tasks:

    json, table, question   answers that repeat their prompts; see `repeating_texts.py`
    free                    the model's own greedy answers to random prompts, which repeat nothing:
                            what the look-up costs
    misleading              answers of few different tokens in random order: drafts are found and
                            most are wrong

A random checkpoint repeats nothing. So in all tasks but `free` each sampled token is replaced by
the next one of a written answer, right behind the sampling. All else is the server's: lookup, the
number of drafts, the step that verifies them. So the share of right drafts is that of prompt
lookup in such texts, in the bundled tokenizer's short tokens.

Both ways share a scheduler, so prompts are computed once and come from its prefix cache then; the
clock runs over the answers alone. They take turns by steps, within the same answers, so that a
slower moment of the machine slows both; with `--turns answers` by whole answers.
Medians over the rounds, and of the rounds' ratios, after a round that does not count. The last line
is one JSON document.

--clock cpu: the scheduler learns from the CPU seconds of steps. With one thread, on a machine that
other programs use, these are what a quiet machine's wall clock shows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engine_requests import GREEDY, Loop, open_runner, random_request
from processes import BUNDLED, arguments, numbers, print_document
from repeating_texts import KINDS, texts_of
from vlmserve.models import bundled
from vlmserve.models.batch import ScheduledSequence
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.router.messages import AddRequest
from vlmserve.router.scheduler import scheduler
from vlmserve.router.scheduler.interface import DraftCounts, SchedulerLimits


def parse_arguments() -> argparse.Namespace:
    return arguments(
        __doc__,
        checkpoint=BUNDLED,
        dtype="auto",
        device="auto",
        concurrency="1,4,16",
        drafts=(8, "--num-speculative-tokens"),
        tasks=",".join((*KINDS, "free", "misleading")),
        records=(8, "records of a prompt"),
        answer=(400, "tokens of an answer, at most"),
        clock=["wall", "cpu"],
        turns=["steps", "answers"],
        rounds=5,
    )


@dataclass(slots=True)
class Written:
    """Answers that replace the sampled tokens, by sequence id; sampled ones are kept without."""

    answers: dict[str, list[int]] = field(default_factory=dict)

    def place_behind(self, runner: ModelRunner) -> None:
        """Replace tokens between the sampling and the comparison with the drafts."""
        collect = runner.next_pass.collect

        def replaced(rows: list[ScheduledSequence], *more: Any) -> tuple[list[int], dict[int, Any]]:
            token_ids, logprobs = collect(rows, *more)
            first = 0
            for row in rows:
                num_places = 1 + row.num_drafts
                if (answer := self.answers.get(row.request_id)) is not None:
                    written = answer[row.sample_index : row.sample_index + num_places]
                    token_ids[first : first + len(written)] = written
                first += num_places
            return token_ids, logprobs

        runner.next_pass.collect = replaced  # type: ignore[method-assign, assignment]


@dataclass(slots=True)
class Side:
    """Figures of the steps with drafts or without, of a shared scheduler; lists by round."""

    loop: Loop
    clock: Callable[[], float]
    has_drafts: bool
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    num_steps: int = 0
    _num_tokens: int = 0
    _wall_s: float = 0.0
    _cpu_s: float = 0.0

    def step(self) -> bool:
        """Compute a step of the answers, on the clock. False: all have ended."""
        wall, cpu = time.perf_counter(), time.process_time()
        with nullcontext() if self.has_drafts else without_drafts():
            num_new = sum(compute(self.loop, self.clock))
        self._wall_s += time.perf_counter() - wall
        self._cpu_s += time.process_time() - cpu
        self._num_tokens += num_new
        self.num_steps += num_new > 0
        return num_new > 0

    def start_round(self) -> None:
        self.num_steps, self._num_tokens, self._wall_s, self._cpu_s = 0, 0, 0.0, 0.0

    def end_round(self) -> None:
        self.wall.append(self._num_tokens / self._wall_s)
        self.cpu.append(self._num_tokens / self._cpu_s)


def compute(loop: Loop, clock: Callable[[], float]) -> list[int]:
    """Compute a step as the engine does; how many tokens each answer got."""
    batch = loop.scheduler.schedule()
    if batch is None:
        return []
    started_at = clock()
    result = loop.runner.execute(batch)
    progress = loop.scheduler.update(result, clock() - started_at)
    return [len(one.token_ids) for one in progress]


def compute_prompts(loop: Loop, requests: list[AddRequest], clock: Callable[[], float]) -> None:
    for request in requests:
        loop.put(request)
    while len(compute(loop, clock)) < len(requests):
        pass


@contextmanager
def without_drafts() -> Iterator[None]:
    """As without the option, for a scheduler that has it: nothing is looked up or measured."""
    parts = ((scheduler, "add_drafts"), (scheduler.DraftRecord, "record_decodes"))
    found = [getattr(*part) for part in parts]
    for owner, name in parts:
        setattr(owner, name, lambda *_: None)
    yield
    for (owner, name), part in zip(parts, found, strict=True):
        setattr(owner, name, part)


def loop_of(runner: ModelRunner, num_seqs: int, num_drafts: int) -> Loop:
    """A scheduler for this many requests at once."""
    limits = SchedulerLimits(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=2048,
        max_num_batched_images=1,
        max_model_len=runner.info.max_model_len,
        num_speculative_tokens=num_drafts,
    )
    return Loop(runner, limits, np.random.default_rng(0))


def requests_of(
    runner: ModelRunner, args: argparse.Namespace, task: str, num_seqs: int
) -> tuple[list[AddRequest], dict[str, list[int]]]:
    """The requests of a round, and the written answers by sequence id."""
    tokenizer = Tokenizer.from_file(str(bundled.CHECKPOINT / "tokenizer.json"))
    requests, answers = [], {}
    for number in range(num_seqs):
        name = str(number)
        if task == "free":
            rng = np.random.default_rng(number)
            requests.append(random_request(rng, runner, name, 48, args.answer))
            continue
        if task == "misleading":
            rng = np.random.default_rng(number)
            prompt, answer = (rng.integers(300, 306, size).tolist() for size in (48, args.answer))
        else:
            texts = texts_of(task, number, args.records)
            prompt, answer = (tokenizer.encode(one).ids for one in texts)
        answers[f"0/{name}"] = answer = answer[: args.answer]
        requests.append(
            AddRequest(
                request_id=name,
                prompt_token_ids=prompt,
                sampling=GREEDY,
                max_tokens=len(answer),
                eos_token_ids=[],
            )
        )
    return requests, answers


def measure(
    runner: ModelRunner, written: Written, args: argparse.Namespace, num_seqs: int, task: str
) -> dict[str, float]:
    """Steps or rounds with and without drafts alternate; each round starts with the other."""
    requests, written.answers = requests_of(runner, args, task, num_seqs)
    loop = loop_of(runner, num_seqs, args.drafts)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    plain, drafted = (Side(loop, clock, has_drafts) for has_drafts in (False, True))
    before = DraftCounts()
    for number in range(1 + args.rounds):
        before = replace(loop.scheduler.counts().drafts)
        sides = (plain, drafted)[:: -1 if number % 2 else 1]
        for side in sides:
            side.start_round()
        # Those whose steps take turns within one answer.
        for group in [sides] if args.turns == "steps" else [(side,) for side in sides]:
            compute_prompts(loop, requests, clock)
            turns = cycle(group)
            while next(turns).step():
                pass
        for side in sides:
            side.end_round()
    return figures(plain, drafted, before)


def figures(plain: Side, drafted: Side, before: DraftCounts) -> dict[str, float]:
    """Medians, ratios of drafts over none, and the share of right drafts in the last round."""
    pairs: Mapping[str, tuple[list[float], list[float]]] = {
        "wall": (plain.wall[1:], drafted.wall[1:]),
        "cpu": (plain.cpu[1:], drafted.cpu[1:]),
    }
    ratios = {
        f"{name}_ratio": round(statistics.median(b / a for a, b in zip(*both, strict=True)), 3)
        for name, both in pairs.items()
    }
    counts = drafted.loop.scheduler.counts().drafts
    num_drafts = counts.num_tokens - before.num_tokens
    return {
        "tokens_per_s": round(statistics.median(pairs["wall"][0]), 1),
        "tokens_per_s_with_drafts": round(statistics.median(pairs["wall"][1]), 1),
        **ratios,
        "steps": plain.num_steps,
        "steps_with_drafts": drafted.num_steps,
        "drafts": num_drafts,
        "right": round((counts.num_accepted - before.num_accepted) / max(1, num_drafts), 3),
    }


def main() -> None:
    args = parse_arguments()
    runner = open_runner(args.checkpoint, dtype=args.dtype, device=args.device)
    written, found = Written(), {}
    written.place_behind(runner)
    for num_seqs in numbers(args.concurrency):
        for task in args.tasks.split(","):
            row = found[f"{task}/{num_seqs}"] = measure(runner, written, args, num_seqs, task)
            print(f"{task:<8} {num_seqs:>3} at once", row, flush=True)
    print_document(args, results=found)


if __name__ == "__main__":
    main()
