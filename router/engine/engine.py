"""The engine: one asyncio loop that turns accepted requests into tokens.

Owns the queue, the scheduler with its blocks, and the one thread that computes steps. Everything
but `runner.execute` runs on the loop and returns at once. Knows nothing of sockets (the caller
passes `send`), tensors or text.

Every accepted request ends in exactly one final message: an output with a finish reason, or a
`RequestFailed`.
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
from functools import partial

from ...models.batch import (
    AdapterInfo,
    AdapterRef,
    DeviceLostError,
    OnLaunch,
    StepBatch,
    StepResult,
    TokenMatcher,
    ignore,
)
from ..config import EngineConfig
from ..errors import (
    AdapterUnusableError,
    EngineError,
    EngineInternalError,
    InvalidRequestError,
    failure_of,
)
from ..messages import (
    VISION_BOUNDS_S,
    AddRequest,
    EngineReady,
    EngineStats,
    FromEngine,
    ImagePiece,
    RequestsStarted,
    SequenceOutput,
    StepOutputs,
)
from ..scheduler.admission import AdmissionLimits, check_request
from ..scheduler.interface import Progress, SchedulerLimits
from ..scheduler.request_queue import QueueLimits, RequestQueue
from ..scheduler.scheduler import Scheduler
from ..scheduler.sequence import Sequence
from ..scheduler.throughput import WaitEstimator
from .adapter_loader import AdapterLoader
from .gate import Gate
from .grammar_compiler import GrammarCompiler
from .host_images import HostImages
from .insertions import Insertions
from .reports import EngineSnapshot, add_adapters, output_of, stats_of
from .runner_protocol import Runner, check_result
from .step_watchdog import StepWatchdog

logger = logging.getLogger("vlmserve.engine")

NO_ADAPTERS = "this engine serves no adapters: start the server with --max-loras 8, for example"

Send = Callable[[int, FromEngine], None]


class DuplicateRequestError(ValueError):
    """A worker used the id of one of its open requests again: a bug of the worker."""


class Engine:
    """Takes requests by `add`, sends messages by `send(worker_id, message)`, while `run` runs.

    executor: the one thread that loaded the runner. The engine creates what is None.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        send: Send,
        executor: ThreadPoolExecutor | None = None,
        wait_estimator: WaitEstimator | None = None,
    ) -> None:
        self._runner, self._config, self._send = runner, config, send
        self._limits = AdmissionLimits.of(runner.info)
        self._wait_estimator = wait_estimator or WaitEstimator()
        self._queue = RequestQueue(_queue_limits(config), self._wait_estimator)
        self.scheduler = Scheduler(runner.info, self._scheduler_limits(), self._queue, send)
        self._host_images = HostImages.of(config, runner.info, self._queue)
        self._gate = Gate(
            self._queue, self._wait_estimator, config, lambda: self.scheduler.num_running
        )
        self._open: dict[tuple[int, str], Sequence] = {}
        self._grammar_compiler = GrammarCompiler(runner.compile_grammar, self._take_matcher)
        self._adapters = self._new_loader()
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="model")
        self.step_watchdog = StepWatchdog(lambda: runner.num_layers_started)
        self._plans_ahead = config.plans_ahead(runner.info.device)
        self._insertions = Insertions(
            self.scheduler, self._execute, self._report_started, self._deliver, self._fail_step
        )
        inserts = not self._plans_ahead and runner.call_between_layers(self._insertions.compute)
        self._insert = self._insertions.insert if inserts else ignore
        self._num_steps, self._vision_seconds = 0, 0.0
        self._vision_step_counts = [0] * (len(VISION_BOUNDS_S) + 1)

    def _new_loader(self) -> AdapterLoader | None:
        if self._runner.adapters is None:
            return None
        limit = self._config.lora_host_bytes
        return AdapterLoader(self._runner.adapters, limit, self._take_adapter)

    # Requests of workers

    def add(self, worker_id: int, request: AddRequest) -> None:
        """Queue a request, or send at once why it fails.

        Raises DuplicateRequestError if the worker has an open request of this id.
        """
        request_ids = request.answer_ids
        for request_id in request_ids:
            if (worker_id, request_id) in self._open or request_ids.count(request_id) > 1:
                raise DuplicateRequestError(f"request {request_id!r} is open already")
        try:
            check_request(request, self._limits)
            self._gate.check(request)
            sequences = self._sequences_of(worker_id, request)
            self._queue.put(sequences[0])
        except EngineError as error:
            for request_id in request_ids:
                self._send(worker_id, failure_of(request_id, error))
            return
        for sequence in sequences:
            self._open[worker_id, sequence.request_id] = sequence
        if request.grammar is not None:
            self._grammar_compiler.start(request, sequences)
        if self._adapters is not None and request.adapter is not None:
            self._adapters.use(request.adapter, sequences)
        self._insert()

    def _sequences_of(self, worker_id: int, request: AddRequest) -> list[Sequence]:
        """Its answers, with their adapter if that is in memory. Raises InvalidRequestError."""
        sequences = Sequence.of(worker_id, request)
        if request.adapter is None:
            return sequences
        if self._adapters is None:
            raise InvalidRequestError(NO_ADAPTERS)
        if (info := self._adapters.find(request.adapter)) is not None:
            for sequence in sequences:
                sequence.take(info)
        return sequences

    def _take_adapter(
        self, sequences: list[Sequence], result: AdapterInfo | AdapterUnusableError
    ) -> None:
        """Let answers run whose adapter was read, or end them with an error."""
        if isinstance(result, AdapterInfo):
            for sequence in sequences:
                self.scheduler.make_ready(sequence, result)
            return
        for sequence in sequences:
            self.scheduler.abort(sequence)
        self._fail(sequences, result)

    def _take_matcher(self, sequences: list[Sequence], result: TokenMatcher | EngineError) -> None:
        """Let these answers of one request run, or end them with an error."""
        if not isinstance(result, EngineError):
            for sequence in sequences:
                self.scheduler.make_ready(sequence, result.copy())
            return
        logger.error("the adapter %s cannot be used: %s", sequences[0].adapter_name, result)
        for sequence in sequences:
            self.scheduler.abort(sequence)
        self._fail(sequences, result)

    def receive(self, worker_id: int, piece: ImagePiece) -> None:
        """Take a piece of an image that this worker was asked for.

        Raises MalformedFrameError if it does not continue what is here: a bug of the worker.
        """
        self._queue.receive(worker_id, piece)

    async def load_adapter(self, adapter: AdapterRef) -> AdapterInfo:
        """Read an adapter before any request uses it. Raises AdapterUnusableError."""
        if self._adapters is None:
            raise AdapterUnusableError(NO_ADAPTERS)
        return await self._adapters.load(adapter)

    async def unload_adapter(self, digest: str) -> None:
        """Forget an adapter when no open answer uses it."""
        if self._adapters is not None:
            await self._adapters.unload(digest)

    def abort(self, worker_id: int, request_ids: Iterable[str]) -> None:
        """End requests of this worker. Ids that are not open are ignored.

        Their blocks are free at once, or right after the step that computes them.
        """
        found = [self._open.get((worker_id, request_id)) for request_id in request_ids]
        ends = [self.scheduler.abort(sequence) for sequence in found if sequence is not None]
        self._deliver([progress for progress in ends if progress is not None])

    def drop_worker(self, worker_id: int) -> None:
        """Abort all requests of a worker that disconnected."""
        self.abort(
            worker_id, [request_id for owner, request_id in self._open if owner == worker_id]
        )

    # The loop

    async def run(self) -> None:
        """Compute steps until cancelled. Raises DeviceLostError if the device is lost."""
        while True:
            batch = self.scheduler.schedule()
            if batch is None:
                await self._queue.wait()
            else:
                await self._run_step(batch)
                await self._insertions.end(self._executor)

    async def _run_step(self, batch: StepBatch) -> None:
        started_at = time.monotonic()
        self._report_started()
        self.step_watchdog.begin(batch)
        is_computed = False
        try:
            result = await self._compute(batch)
        except DeviceLostError:
            raise  # the process exits, and the supervisor starts another
        except Exception:
            logger.exception("a step of %d sequences failed", len(batch.sequences))
            self._fail_step(self.scheduler.fail_step())
        else:
            is_computed = True
            self._wait_estimator.record_step(started_at, batch.num_tokens)
            self._count_vision(result.vision_seconds)
            self._host_images.write(result.kept)
            seconds = time.monotonic() - started_at - self._insertions.seconds
            self._deliver(self.scheduler.update(result, seconds))
        finally:
            self._num_steps += 1
            self.step_watchdog.end(is_computed=is_computed)

    async def _compute(self, batch: StepBatch) -> StepResult:
        """Compute a step in its thread, and meanwhile prepare the next step."""
        loop = asyncio.get_running_loop()
        if not self._plans_ahead:
            computing = loop.run_in_executor(self._executor, self._execute, batch)
            self._insert()  # a newcomer may wait for this step already
            return await computing
        is_launched = asyncio.Event()
        on_launch = partial(loop.call_soon_threadsafe, is_launched.set)
        computing = loop.run_in_executor(self._executor, self._execute, batch, on_launch)
        computing.add_done_callback(lambda _: is_launched.set())  # also if it fails before
        await is_launched.wait()
        if not computing.done():
            rows = self.scheduler.plan_ahead()
            are_all = self.scheduler.has_all_ahead
            self._runner.prepare(rows, lambda: are_all and not self._queue.has_ready)
        return await computing

    def _count_vision(self, seconds: float) -> None:
        if seconds > 0:
            self._vision_seconds += seconds
            self._vision_step_counts[bisect.bisect_left(VISION_BOUNDS_S, seconds)] += 1

    def _execute(self, batch: StepBatch, on_launch: OnLaunch = ignore) -> StepResult:
        """In the step's thread: compute, and check that the result is complete."""
        result = self._runner.execute(batch, on_launch)
        check_result(batch, result)
        return result

    def close(self, error: EngineError) -> None:
        """End every open request with `error`. Call it after `run`; a step may still run."""
        self._grammar_compiler.close()
        self._host_images.close()
        self._insertions.close()
        self._fail(list(self._open.values()), error)
        if self._adapters is not None:
            self._adapters.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # Messages to workers

    def _deliver(self, progress: list[Progress]) -> None:
        """Send its outputs to each worker, in one message."""
        outputs: dict[int, list[SequenceOutput]] = defaultdict(list)
        for change in progress:
            sequence = change.sequence
            outputs[sequence.worker_id].append(output_of(change))
            if change.finish_reason is not None:
                if sequence.ran_at is not None:
                    self._wait_estimator.record_run(time.monotonic() - sequence.ran_at)
                self._forget(sequence)
        rejections = self._gate.rejections() if outputs else []
        for worker_id, worker_outputs in outputs.items():
            self._send(worker_id, StepOutputs(outputs=worker_outputs, rejections=rejections))

    def _report_started(self) -> None:
        """With several engines: report the requests that the next step starts."""
        started: dict[int, list[str]] = defaultdict(list)
        for sequence in self.scheduler.take_started():
            started[sequence.worker_id].append(sequence.request_id)
        if self._config.num_replicas > 1:
            for worker_id, request_ids in started.items():
                self._send(worker_id, RequestsStarted(request_ids))

    def _fail_step(self, sequences: list[Sequence]) -> None:
        # Only the log has the cause: it may name paths or quote a prompt.
        message = "the engine failed while it computed this request; send it again"
        self._fail(sequences, EngineInternalError(message))

    def _fail(self, sequences: list[Sequence], error: EngineError) -> None:
        for sequence in sequences:
            self._forget(sequence)
            self._send(sequence.worker_id, failure_of(sequence.request_id, error))

    def _forget(self, sequence: Sequence) -> None:
        del self._open[sequence.worker_id, sequence.request_id]
        self._grammar_compiler.leave(sequence)
        if self._adapters is not None:
            self._adapters.leave(sequence)

    # State

    def snapshot(self) -> EngineSnapshot:
        """The state at this moment, for tests."""
        sequences = self._open.values()
        return EngineSnapshot(
            open=frozenset(self._open),
            num_aborting=sum(sequence.is_aborted for sequence in sequences),
            num_compiling=sum(sequence.lacks_matcher for sequence in sequences),
            num_steps=self._num_steps,
            scheduler=self.scheduler.snapshot(),
        )

    def ready_message(self) -> EngineReady:
        """The message to each worker once the model is loaded."""
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
            max_memory_bytes=self._most_bytes(),
        )

    def _most_bytes(self) -> int:
        """With all adapters and the images of all requests that may wait; 0 if the runner's part is
        unknown.
        """
        runner_bytes = self._runner.info.max_memory_bytes
        adapters = self._config.lora_host_bytes if self._adapters is not None else 0
        return runner_bytes + self._config.max_queue_bytes + adapters if runner_bytes else 0

    def stats(self) -> EngineStats:
        """Counts at this moment, for metrics."""
        stats = stats_of(self.scheduler.counts(), len(self._open))
        stats.num_steps = self._num_steps
        stats.vision_seconds = self._vision_seconds
        stats.vision_step_counts = list(self._vision_step_counts)
        stats.block_size = self._runner.info.pools.block_size
        self._host_images.add_to(stats)
        if self._adapters is not None:
            add_adapters(stats, self._open.values())
        return stats

    def _scheduler_limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            max_num_batched_images=self._config.max_num_batched_images,
            max_model_len=self._limits.max_model_len,
            prefix_cache=self._config.prefix_cache,
            image_cache=self._config.image_cache,
            poison_freed_blocks=self._config.poison_freed_blocks,
            max_loras=self._config.max_loras,
            num_speculative_tokens=self._config.max_drafts,
        )


def _queue_limits(config: EngineConfig) -> QueueLimits:
    return QueueLimits(
        max_requests=config.max_queue_requests,
        max_tokens=config.max_queue_tokens,
        max_bytes=config.max_queue_bytes,
    )
