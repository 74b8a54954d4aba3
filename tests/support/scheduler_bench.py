"""A scheduler over tiny pools and the fake runner, stepped by hand, and what came of each request.

Owns no request. Every step checks both pools from scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from support.fake_runner import FakeAdapters, FakeRunner, fake_info

from vlmserve.models.batch import (
    ImageRef,
    ImageTiles,
    PoolSizes,
    ScheduledSequence,
    StepBatch,
    StepResult,
)
from vlmserve.router.messages import AddRequest, ImagePiece, NeedImage
from vlmserve.router.scheduler.admission import AdmissionLimits, check_request
from vlmserve.router.scheduler.interface import SchedulerLimits
from vlmserve.router.scheduler.request_queue import QueueLimits, RequestQueue
from vlmserve.router.scheduler.scheduler import Scheduler
from vlmserve.router.scheduler.sequence import Sequence


class AnyText:
    """A matcher that allows everything."""

    has_failed = False

    def accept(self, token_id: int) -> None:
        pass

    def copy(self) -> AnyText:
        return self

    def num_allowed(self, token_ids: list[int]) -> int:
        return len(token_ids)

    def forced(self) -> list[int]:
        return []


@dataclass
class Bench:
    """A scheduler, its queue and a fake runner, stepped by hand.

    seconds_of: the measured time of a step; None: no step is measured. tiles_after: how many plans
    after its question an image arrives, in pieces of 5 bytes; None: it comes with its request.
    num_lost_runs: preemptions of sequences that had been in a step since they last started. A
    follower that has just forked may lose its blocks before its first step: nothing is lost then.
    """

    pools: PoolSizes = field(default_factory=lambda: PoolSizes(32, 8, 4))
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    max_num_batched_images: int = 4
    max_model_len: int = 64
    prefix_cache: bool = True
    image_cache: bool = True
    image_cost_tokens: int = 0
    num_image_layers: int = 1
    plans_ahead: bool = False
    seconds_of: Callable[[StepBatch], float] | None = None
    tiles_after: int | None = None
    max_loras: int = 0
    num_speculative_tokens: int = 0
    repeats: bool = False
    poison_freed_blocks: bool = False

    def __post_init__(self) -> None:
        info = fake_info(
            self.pools, self.max_model_len, self.image_cost_tokens, self.num_image_layers
        )
        self.adapters = FakeAdapters(self.max_loras)
        self.runner = FakeRunner(info, self.adapters, repeats=self.repeats)
        self.queue = RequestQueue(QueueLimits(1000, 10**6, 10**9))
        self.limits = AdmissionLimits.of(self.runner.info)
        limits = SchedulerLimits(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_num_batched_images,
            self.limits.max_model_len,
            self.prefix_cache,
            self.image_cache,
            poison_freed_blocks=self.poison_freed_blocks,
            max_loras=self.max_loras,
            num_speculative_tokens=self.num_speculative_tokens,
        )
        self.scheduler = Scheduler(self.runner.info, limits, self.queue, self._take_question)
        self.questions: list[NeedImage] = []
        self._due: list[tuple[int, NeedImage]] = []
        self._num_plans = 0
        self._images: dict[tuple[str, bytes], ImageRef] = {}
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, str] = {}
        self.sequences: dict[str, Sequence] = {}
        self.num_lost_runs = 0
        self.num_inserted = 0
        self._num_preemptions: dict[str, int] = {}
        self._have_run: set[str] = set()
        self._streaming: dict[str, int] = {}
        self.rows_ahead: list[ScheduledSequence] = []
        self._waited = False
        self._inserted: StepBatch | None = None

    def add(self, request: AddRequest) -> Sequence:
        check_request(request, self.limits)
        if self.tiles_after is not None:
            self._images |= {(request.request_id, one.content_hash): one for one in request.images}
            refs = [one.ref for one in request.images if isinstance(one, ImageTiles)]
            request = msgspec.structs.replace(request, images=refs)
        sequences = Sequence.of(0, request)
        if request.adapter is not None:
            info = self.adapters.read(request.adapter)
            for sequence in sequences:
                sequence.take(info)
        self.queue.put(sequences[0])
        for sequence in sequences:
            sequence.sequence_id = sequence.request_id
            self.tokens[sequence.request_id] = []
            self.sequences[sequence.request_id] = sequence
        return sequences[0]

    def make_ready(self, request: AddRequest) -> None:
        """The grammar of `request` is compiled: those of its answers that are there may run."""
        for request_id in request.answer_ids:
            if not self.sequences[request_id].is_finished:
                self.scheduler.make_ready(self.sequences[request_id], AnyText())

    @property
    def has_coming(self) -> bool:
        """Whether an image was asked for and is not here yet."""
        return bool(self._due)

    def _take_question(self, worker_id: int, question: NeedImage) -> None:
        self.questions.append(question)
        self._due.append((self._num_plans + (self.tiles_after or 0), question))

    def _deliver(self) -> None:
        """What the worker sends of a request that is open, and of one that has just ended."""
        due = [one for one in self._due if one[0] <= self._num_plans]
        self._due = [one for one in self._due if one[0] > self._num_plans]
        self._num_plans += 1
        for _, question in due:
            image = self._images[question.request_id, question.content_hash]
            assert isinstance(image, ImageTiles)
            for offset in range(0, len(image.data), 5):
                data = image.data[offset : offset + 5]
                piece = ImagePiece(question=question.question, offset=offset, data=data)
                self.queue.receive(0, piece)

    def plan(self) -> StepBatch | None:
        """The next step. Asserts that the protected sequence proceeds in it, or its image.

        Or else in the step after it, which is for an owner that runs nothing.
        """
        self._deliver()
        first = self.scheduler.protected
        batch = self.scheduler.schedule()
        for one in batch.sequences if batch else ():
            assert not self.sequences[one.request_id].lacks_matcher
        rows = self.scheduler.plan_ahead() if self.plans_ahead and batch is not None else []
        if first is not None and self.max_num_batched_tokens >= self.max_num_seqs:
            assert batch is not None
            is_computed = first.sequence_id in {one.request_id for one in batch.sequences}
            is_seeing = any(
                one.block_ids in [entry.block_ids for entry in first.images] for one in batch.images
            )
            is_newcomers = self.seconds_of is not None and len(batch.sequences) == 1
            assert is_computed or is_seeing or (is_newcomers and not self._waited)
            self._waited = not (is_computed or is_seeing)
        self.rows_ahead = rows
        self._count_lost_runs()
        self._have_run |= {one.request_id for one in batch.sequences} if batch else set()
        return batch

    def _count_lost_runs(self) -> None:
        for name, sequence in self.sequences.items():
            if sequence.num_preemptions > self._num_preemptions.get(name, 0):
                self._num_preemptions[name] = sequence.num_preemptions
                self.num_lost_runs += name in self._have_run
                self._have_run.discard(name)

    def streams(self, batch: StepBatch) -> list[str]:
        """Those in the batch who got a token in the step before and have kept their place since."""
        ids = (one.request_id for one in batch.sequences)
        return [
            name
            for name in ids
            if self._streaming.get(name) == self.sequences[name].num_preemptions
        ]

    def finish(self, batch: StepBatch) -> None:
        self._streaming.clear()
        seconds = None if self.seconds_of is None else self.seconds_of(batch)
        for progress in self.scheduler.update(self._execute(batch), seconds):
            self._take(progress)
            if progress.token_ids:
                sequence = progress.sequence
                self._streaming[sequence.sequence_id] = sequence.num_preemptions
        self.take_inserted()
        self.scheduler.check()

    def insert(self, *, is_late: bool = False) -> StepBatch | None:
        """A newcomer's step inside the planned one, if it is due.

        is_late: it is computed after the planned one, before the next is planned.
        """
        batch = self._inserted = self.scheduler.insert()
        if batch is not None:
            self._have_run |= {one.request_id for one in batch.sequences}
            self.runner.between_layers = None if is_late else self.take_all_inserted
            self.num_inserted += 1
        return batch

    def take_all_inserted(self) -> None:
        """Compute what was inserted, and what is due then, one after the other."""
        while self._inserted is not None:
            self.take_inserted()
            self.insert()

    def take_inserted(self) -> None:
        """Compute what was inserted and is not computed yet."""
        batch, self._inserted = self._inserted, None
        if batch is not None:
            seconds = None if self.seconds_of is None else self.seconds_of(batch)
            result = self.runner.execute(batch)
            for progress in self.scheduler.update(result, seconds, is_inserted=True):
                self._take(progress)

    def _execute(self, batch: StepBatch) -> StepResult:
        """Compute; the rows planned ahead are laid out meanwhile."""
        return self.runner.execute(batch, lambda: self.runner.prepare(self.rows_ahead))

    def fail(self, batch: StepBatch, is_computed: bool) -> None:
        """Lose the step that was planned: before it is computed, or only its result."""
        if is_computed:
            self._execute(batch)
        for sequence in self.scheduler.fail_step():
            self._end(sequence.sequence_id, "failed")
        self.take_inserted()
        self.scheduler.check()

    def step(self) -> StepBatch | None:
        batch = self.plan()
        if batch is not None:
            self.finish(batch)
        return batch

    def abort(self, request_id: str) -> None:
        progress = self.scheduler.abort(self.sequences[request_id])
        if progress is not None:
            self._take(progress)

    def run(self, max_steps: int = 100_000) -> None:
        for _ in range(max_steps):
            if self.step() is None and not self._due:
                return
        raise AssertionError("the requests do not finish")

    def _take(self, progress) -> None:
        request_id = progress.sequence.sequence_id
        assert request_id not in self.endings, "an output after the last one"
        self.tokens[request_id] += progress.token_ids
        if progress.finish_reason is not None:
            self._end(request_id, progress.finish_reason)

    def _end(self, request_id: str, ending: str) -> None:
        assert request_id not in self.endings, "two final messages"
        self.endings[request_id] = ending

    def assert_all_free(self) -> None:
        assert self.scheduler.snapshot().text.used == 0
        assert self.scheduler.snapshot().images.used == 0
        assert len(self.queue) == self.queue.num_tokens == self.queue.num_bytes == 0
        assert len(self.queue.lines) == len(self.queue.owners) == 0
        assert self.scheduler.tiles.num_images == self.scheduler.tiles.num_bytes == 0
        assert self.queue.owners.num_remembered == self.queue.owners.num_running.total() == 0
        self.scheduler.check()
