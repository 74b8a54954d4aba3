"""The engine: one asyncio loop that turns accepted requests into tokens.

Owns the queue, the scheduler with its blocks, and the one thread that computes
steps. Everything but `runner.execute` runs on the loop and returns at once. Knows
nothing of sockets (it is handed a `send`), tensors or text.

Every accepted request ends in exactly one final message: an output with a finish
reason, or a `RequestFailed`.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from ...models.batch import (
    DeviceLostError,
    OnLaunch,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
)
from ..config import EngineConfig
from ..errors import (
    EngineError,
    EngineInternalError,
    QueueFullError,
    failure_of,
)
from ..messages import (
    VISION_BOUNDS_S,
    AddRequest,
    EngineReady,
    EngineStats,
    FromEngine,
    Refusal,
    RequestsBegun,
    SequenceOutput,
    StepOutputs,
)
from ..scheduler.admission import AdmissionLimits, check_request
from ..scheduler.request_queue import QueueLimits, RequestQueue
from ..scheduler.scheduler import Progress, Scheduler, SchedulerLimits
from ..scheduler.sequence import Sequence
from ..scheduler.throughput import LONGEST_S, SHORTEST_S, Pace
from .grammar_compiler import GrammarJobs
from .runner_protocol import Runner
from .step_watchdog import StepWatch

logger = logging.getLogger("vlmserve.engine")

Send = Callable[[int, FromEngine], None]


class DuplicateRequestError(ValueError):
    """A worker used the id of one of its open requests again: it is broken."""


class Engine:
    """Requests in by `add`, messages out by `send(worker_id, message)`, while `run` runs.

    executor: one thread, the one that loaded the runner; made where None.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        send: Send,
        executor: ThreadPoolExecutor | None = None,
    ) -> None:
        self._runner = runner
        self._config = config
        self._send = send
        self._limits = AdmissionLimits.of(runner.info)
        self._pace = Pace()
        self._queue = RequestQueue(_queue_limits(config), self._pace)
        self.scheduler = Scheduler(runner.info, self._scheduler_limits(), self._queue)
        self._open: dict[tuple[int, str], Sequence] = {}
        self._grammar_jobs = GrammarJobs(runner.compile_grammar, self._take_matcher)
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="model")
        self.step_watch = StepWatch(lambda: runner.num_layers_begun)
        self._plans_ahead = config.plans_ahead(runner.info.device)
        self._num_steps = 0
        self._vision_seconds = 0.0
        self._vision_step_counts = [0] * (len(VISION_BOUNDS_S) + 1)

    # What workers ask for

    def add(self, worker_id: int, request: AddRequest) -> None:
        """Queue a request, or answer at once why not.

        Raises DuplicateRequestError if the worker has an open request of this id.
        """
        request_ids = request.answer_ids
        for request_id in request_ids:
            if (worker_id, request_id) in self._open or request_ids.count(request_id) > 1:
                raise DuplicateRequestError(f"request {request_id!r} is open already")
        try:
            check_request(request, self._limits)
            self._refuse_long_wait(request.priority)
            sequences = Sequence.of(worker_id, request)
            self._queue.put(sequences[0])
        except EngineError as error:
            for request_id in request_ids:
                self._send(worker_id, failure_of(request_id, error))
            return
        for sequence in sequences:
            self._open[worker_id, sequence.request_id] = sequence
        if request.grammar is not None:
            self._grammar_jobs.start(request, sequences)

    def _refuse_long_wait(self, priority: int) -> None:
        """Raises QueueFullError if a newcomer would have to wait longer than is allowed."""
        limit_s = self._config.max_queue_wait_s
        if limit_s is None:
            return
        num_ahead = self._queue.num_ahead(priority)
        num_places = self._config.max_num_seqs
        place = num_ahead + 1 - (num_places - self.scheduler.num_running)
        if place <= 0:
            return
        wait_s = self._pace.wait_s(place, num_places)
        if wait_s is not None and wait_s > limit_s:
            raise QueueFullError(
                f"the request would wait about {wait_s:.1f} s for its turn, the limit is "
                f"{limit_s:g} s. Try again later or start the server with a larger "
                "--max-queue-wait",
                min(max(wait_s - limit_s, SHORTEST_S), LONGEST_S),
            )

    def _refusal(self) -> Refusal | None:
        """What any newcomer would be told just now, so that workers need not ask."""
        if not len(self._queue):
            return None
        try:
            self._refuse_long_wait(0)
            # A place that has just come free is about to be taken by one who waits.
            if self.scheduler.num_running == self._config.max_num_seqs:
                self._queue.refuse_if_full()
        except QueueFullError as error:
            return Refusal(message=str(error), retry_after_s=error.retry_after_s)
        return None

    def _take_matcher(self, sequences: list[Sequence], result: TokenMatcher | EngineError) -> None:
        """Let these answers of one request take their turn, or end them with an error."""
        if not isinstance(result, EngineError):
            for sequence in sequences:
                self.scheduler.let_on(sequence, result.copy())
            return
        for sequence in sequences:
            self.scheduler.abort(sequence)
        self._fail(sequences, result)

    def abort(self, worker_id: int, request_ids: Iterable[str]) -> None:
        """End requests of this worker; ids that are not open any more are passed over.

        What is freed is free at once, or right after the step that computes it.
        """
        found = [self._open.get((worker_id, request_id)) for request_id in request_ids]
        progress = [self.scheduler.abort(sequence) for sequence in found if sequence is not None]
        self._deliver([one for one in progress if one is not None])

    def drop_worker(self, worker_id: int) -> None:
        """Abort everything of a worker that has gone."""
        self.abort(
            worker_id, [request_id for owner, request_id in self._open if owner == worker_id]
        )

    # The loop

    async def run(self) -> None:
        """Compute steps for ever, or until cancelled.

        Raises DeviceLostError where no step can be computed any more.
        """
        while True:
            batch = self.scheduler.schedule()
            if batch is None:
                await self._queue.wait()
            else:
                await self._run_step(batch)

    async def _run_step(self, batch: StepBatch) -> None:
        began = time.monotonic()
        self._tell_begun()
        self.step_watch.begin(batch)
        is_computed = False
        try:
            result = await self._compute(batch)
        except DeviceLostError:
            raise  # the process ends, and another one takes its place
        except Exception:
            logger.exception("a step of %d sequences failed", len(batch.sequences))
            self._fail(self.scheduler.fail_step(), _step_failure())
        else:
            is_computed = True
            self._pace.count(began, batch.num_tokens)
            self._count_vision(result.vision_seconds)
            self._deliver(self.scheduler.update(result))
        finally:
            self._num_steps += 1
            self.step_watch.end(is_computed=is_computed)

    async def _compute(self, batch: StepBatch) -> StepResult:
        """Let the step's thread compute; do meanwhile what can be done for the next step."""
        loop = asyncio.get_running_loop()
        if not self._plans_ahead:
            return await loop.run_in_executor(self._executor, self._execute, batch)
        is_launched = asyncio.Event()

        def on_launch() -> None:
            loop.call_soon_threadsafe(is_launched.set)

        computing = loop.run_in_executor(self._executor, self._execute, batch, on_launch)
        computing.add_done_callback(lambda _: is_launched.set())  # also where it fails before
        await is_launched.wait()
        if not computing.done():
            self._runner.prepare(self.scheduler.plan_ahead())
        return await computing

    def _count_vision(self, seconds: float) -> None:
        if seconds > 0:
            self._vision_seconds += seconds
            self._vision_step_counts[bisect.bisect_left(VISION_BOUNDS_S, seconds)] += 1

    def _execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """In the step's thread: compute, and make sure that every answer is there."""
        result = self._runner.execute(batch, on_launch)
        expected = {one.request_id for one in batch.sequences if one.sampling is not None}
        if result.token_ids.keys() != expected:
            raise RuntimeError(
                f"the runner sampled {len(result.token_ids)} tokens, {len(expected)} were due"
            )
        targets = {one.request_id: one.prompt for one in batch.sequences if one.prompt is not None}
        told = {one: len(entries) for one, entries in result.prompt_logprobs.items()}
        if told != {one: len(due.token_ids) for one, due in targets.items()}:
            raise RuntimeError("the runner told other log-probabilities of prompts than were due")
        return result

    def close(self, error: EngineError) -> None:
        """End every open request with `error`. Call when `run` is over; a step may still run."""
        self._grammar_jobs.close()
        self._fail(list(self._open.values()), error)
        self._executor.shutdown(wait=False, cancel_futures=True)

    # Answers

    def _deliver(self, progress: list[Progress]) -> None:
        """Send one message to each worker that a step brought something."""
        outputs: dict[int, list[SequenceOutput]] = defaultdict(list)
        for one in progress:
            outputs[one.sequence.worker_id].append(_output_of(one))
            if one.finish_reason is not None:
                self._count_run(one.sequence)
                self._forget(one.sequence)
        refusal = self._refusal() if outputs else None
        for worker_id, of_worker in outputs.items():
            self._send(worker_id, StepOutputs(outputs=of_worker, refusal=refusal))

    def _tell_begun(self) -> None:
        """Name what the next step begins, where another engine might be asked for it."""
        begun: dict[int, list[str]] = defaultdict(list)
        for sequence in self.scheduler.take_begun():
            begun[sequence.worker_id].append(sequence.request_id)
        if self._config.num_replicas > 1:
            for worker_id, request_ids in begun.items():
                self._send(worker_id, RequestsBegun(request_ids))

    def _count_run(self, sequence: Sequence) -> None:
        if sequence.ran_at is not None:
            self._pace.count_run(time.monotonic() - sequence.ran_at)

    def _fail(self, sequences: list[Sequence], error: EngineError) -> None:
        for sequence in sequences:
            self._forget(sequence)
            self._send(sequence.worker_id, failure_of(sequence.request_id, error))

    def _forget(self, sequence: Sequence) -> None:
        del self._open[sequence.worker_id, sequence.request_id]
        self._grammar_jobs.leave(sequence)

    # What can be known of it

    def ready_message(self) -> EngineReady:
        """What a worker is told once the model is loaded."""
        info = self._runner.info
        return EngineReady(
            pid=os.getpid(),
            max_model_len=self._limits.max_model_len,
            vocab_size=info.vocab_size,
            max_num_seqs=self._config.max_num_seqs,
            device=info.device,
            dtype=info.dtype,
            num_text_tokens=info.pools.num_text_blocks * info.pools.block_size,
            num_image_tiles=info.pools.num_image_blocks,
        )

    def stats(self) -> EngineStats:
        """Counts at this moment."""
        text, images = self.scheduler.blocks.text_pool, self.scheduler.blocks.image_pool
        image = images.blocks
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=len(self._open) - self.scheduler.num_running,
            num_steps=self._num_steps,
            text_blocks_used=text.num_used,
            text_blocks_total=text.num_total,
            text_blocks_cached=text.num_cached,
            image_blocks_used=image.num_used,
            image_blocks_cached=image.num_cached,
            image_blocks_total=image.num_total,
            num_preemptions=self.scheduler.num_preemptions,
            num_images_encoded=self.scheduler.num_images_encoded,
            vision_seconds=self._vision_seconds,
            vision_step_counts=list(self._vision_step_counts),
            image_cache_hits=images.num_hits,
            image_cache_misses=images.num_misses,
            image_cache_evictions=images.num_evictions,
            prefix_tokens_queried=self.scheduler.blocks.num_prefix_tokens_queried,
            prefix_tokens_hit=self.scheduler.blocks.num_prefix_tokens_hit,
        )

    def _scheduler_limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            max_num_batched_images=self._config.max_num_batched_images,
            max_model_len=self._limits.max_model_len,
            prefix_cache=self._config.prefix_cache,
            image_cache=self._config.image_cache,
            poison_freed_blocks=self._config.poison_freed_blocks,
        )


def _queue_limits(config: EngineConfig) -> QueueLimits:
    return QueueLimits(
        max_requests=config.max_queue_requests,
        max_tokens=config.max_queue_tokens,
        max_bytes=config.max_queue_bytes,
    )


def _output_of(progress: Progress) -> SequenceOutput:
    sequence = progress.sequence
    is_first = 0 < len(progress.token_ids) == sequence.num_generated_tokens
    return SequenceOutput(
        request_id=sequence.request_id,
        token_ids=progress.token_ids,
        num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
        queue_s=sequence.queue_s if is_first else 0.0,
        finish_reason=progress.finish_reason,
        stop_token_id=progress.stop_token_id,
        logprobs=[] if progress.logprobs is None else [progress.logprobs],
        prompt_logprobs=sequence.prompt_logprobs if is_first else None,
    )


def _step_failure() -> EngineInternalError:
    # The cause stays in the log: it may name paths or quote a prompt.
    return EngineInternalError("the engine failed while it computed this request; send it again")
