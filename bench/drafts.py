"""Measures what drafts save and cost: tokens a second with and without, in turns in one process.

    python bench/checkpoints.py m100 --out m100
    OMP_NUM_THREADS=2 python bench/drafts.py --checkpoint m100 --dtype bfloat16

The scheduler and the runner alone, without a server. Tasks:

    json, table, question   answers that repeat their prompts; see `repeating_texts.py`
    free                    the model's own greedy answers to random prompts, which repeat nothing:
                            what drafts cost

A random checkpoint repeats nothing. So in the first three tasks each sampled token is replaced by
the next one of a written answer, right behind the sampling. All else is the server's: lookup, the
number of drafts, the step that verifies them. So the share of right drafts is that of prompt
lookup in such texts, in the bundled tokenizer's short tokens.

Both ways share a scheduler, so prompts are computed once and come from its prefix cache then; the
clock runs over the answers alone. Medians over the rounds, and of the rounds' ratios, after a round
that does not count. The last line is one JSON document.

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
        tasks=",".join((*KINDS, "free")),
        records=(8, "records of a prompt"),
        answer=(400, "tokens of an answer, at most"),
        clock=["wall", "cpu"],
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
    """Figures of the rounds with drafts or without, of a shared scheduler."""

    loop: Loop
    clock: Callable[[], float]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    num_steps: int = 0
    before: DraftCounts = field(default_factory=DraftCounts)

    def run(self, requests: list[AddRequest]) -> None:
        """Answer these requests; the clock starts when all prompts are computed."""
        for request in requests:
            self.loop.put(request)
        while not self._step(is_prompt=True):
            pass
        self.before = replace(self.loop.scheduler.counts().drafts)
        wall, cpu, self.num_steps, num_tokens = time.perf_counter(), time.process_time(), 0, 0
        while num_new := self._step():
            num_tokens += num_new
            self.num_steps += 1
        self.wall.append(num_tokens / (time.perf_counter() - wall))
        self.cpu.append(num_tokens / (time.process_time() - cpu))

    def _step(self, *, is_prompt: bool = False) -> int:
        """Compute a step as the engine does; how many tokens answers got. 0: all have ended.

        is_prompt: 0 as well if some prompt is not computed afterwards.
        """
        plans = self.loop.scheduler
        batch = plans.schedule()
        if batch is None:
            return 0
        started_at = self.clock()
        result = self.loop.runner.execute(batch)
        progress = plans.update(result, self.clock() - started_at)
        if is_prompt and len(progress) < self.loop.limits.max_num_seqs:
            return 0
        return sum(len(one.token_ids) for one in progress)


@contextmanager
def without_drafts() -> Iterator[None]:
    """As without the option, for a scheduler that has it: nothing is looked up or measured."""
    parts = {name: getattr(scheduler, name) for name in ("add_drafts", "record_decodes")}
    for name in parts:
        setattr(scheduler, name, lambda *_: None)
    yield
    for name, part in parts.items():
        setattr(scheduler, name, part)


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
        prompt, answer = (tokenizer.encode(one).ids for one in texts_of(task, number, args.records))
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
    """Runs with and without drafts alternate; each round starts with the other of the two."""
    requests, written.answers = requests_of(runner, args, task, num_seqs)
    loop = loop_of(runner, num_seqs, args.drafts)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    plain, drafted = Side(loop, clock), Side(loop, clock)
    for number in range(1 + args.rounds):
        for side in (plain, drafted)[:: -1 if number % 2 else 1]:
            with without_drafts() if side is plain else nullcontext():
                side.run(requests)
    return figures(plain, drafted)


def figures(plain: Side, drafted: Side) -> dict[str, float]:
    """Medians, ratios of drafts over none, and the share of drafts that were right."""
    pairs: Mapping[str, tuple[list[float], list[float]]] = {
        "wall": (plain.wall[1:], drafted.wall[1:]),
        "cpu": (plain.cpu[1:], drafted.cpu[1:]),
    }
    ratios = {
        f"{name}_ratio": round(statistics.median(b / a for a, b in zip(*both, strict=True)), 3)
        for name, both in pairs.items()
    }
    counts, before = drafted.loop.scheduler.counts().drafts, drafted.before
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
