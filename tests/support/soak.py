"""Thousands of random requests through one engine on tiny pools, each checked against itself alone.

Owns the load and the check. Requests come in bursts, leave early, repeat pictures and prompts, and
are greedy or seeded. With a folder for adapters, half of them use one of eight, of which a few have
places, fewer are kept in memory, and some are unloaded meanwhile.

After a thousand the same requests come again, in other company: each was computed once alone.
What each must answer is what it answers alone: on roomy pools, with no cache and no company. A
greedy one with an adapter must answer what the merged model answers. With drafts or overlap,
requests have stop tokens, penalties and grammars too, and the one alone has neither. With overlap,
decode steps are replayed from a tape, many prompts are longer than a step, and fewer requests are
open most of the time, since no pass is started while one waits. Where the first other token of a
greedy answer is the oracle's second best by less than 1e-4, or a random number lies within 1e-6 of
the other token's part, rounding decided between them: such excuses are counted.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from support.adapters import MIXED
from support.oracle import EXCUSED_GAP, count_excuses, image, loaded, oracle, prompt
from support.soak_requests import is_plain, recorded_gaps, with_more
from support.stepped import MAX_MODEL_LEN, SteppedEngine, time_all_steps_alike
from support.taped import TapedTorchBackend, TapeRecorder
from transformers import MllamaForConditionalGeneration

from vlmserve.models import bundled
from vlmserve.models.batch import AdapterRef, ImageTiles, PoolSizes, SamplingParams
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.grammar import Grammars
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.lora.limits import AdapterLimits
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import Engine
from vlmserve.router.errors import EngineDeadError
from vlmserve.router.messages import (
    AddRequest,
    FromEngine,
    ImagePiece,
    NeedImage,
    RequestFailed,
    StepOutputs,
)
from vlmserve.router.scheduler.sequence import Sequence

LAYOUT = "tiny"
POOLS = PoolSizes(num_text_blocks=24, num_image_blocks=14, block_size=4)
ROOMY_POOLS = PoolSizes(num_text_blocks=64, num_image_blocks=32, block_size=4)
NUM_RECURRING = 6
# More requests than these are the same ones again, in other company.
NUM_DISTINCT = 1000
# Several for each image.
PIECE_BYTES = 1000
MAX_OPEN = 24
# with overlap, for three of four stretches of so many requests
FEW_OPEN, STRETCH = 2, 10
TIMEOUT_S = 6 * 3600.0
# Places, and the memory of about three adapters, for eight.
MAX_LORAS, ADAPTER_BYTES = 2, 400_000
MAX_RANK = 8
EXCUSED_DRAW = 1e-6


@dataclass
class Answer:
    """What came back for one request."""

    token_ids: list[int] = field(default_factory=list)
    ending: str | None = None


@dataclass
class Report:
    """What a soak saw. rss_early, rss_late: bytes of memory after a fifth and at the end."""

    endings: Counter[str] = field(default_factory=Counter)
    num_excuses: int = 0
    num_adapted: int = 0
    num_slot_loads: int = 0
    num_preemptions: int = 0
    num_evictions: int = 0
    num_image_hits: int = 0
    num_images_sent: int = 0
    num_prefix_hits: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_passes_started: int = 0
    num_passes_used: int = 0
    num_chunk_passes_used: int = 0
    rss_early: int = 0
    rss_late: int = 0


class Soak:
    """One engine and the requests that went through it.

    Each request is drawn from its number, and drawn again for the check: nothing of it is kept.
    """

    def __init__(
        self,
        num_requests: int,
        seed: int,
        adapters: Path | None = None,
        has_drafts: bool = False,
        has_overlap: bool = False,
    ) -> None:
        self._refs: list[AdapterRef | None] = [None]
        if adapters is not None:
            written = [
                one.write(adapters / name, oracle(LAYOUT), name) for name, one in MIXED.items()
            ]
            self._refs = [None] * len(written) + written
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._num_requests = num_requests
        self._answers: dict[str, Answer] = {}
        self._excuses: dict[tuple[str | int, ...], int] = {}
        self._open: set[str] = set()
        self._changed = asyncio.Event()
        self._unloading: set[asyncio.Task[None]] = set()
        max_loras = MAX_LORAS if adapters is not None else 0
        runner = runner_on(POOLS, max_loras, TapedTorchBackend() if has_overlap else None)
        if has_overlap:
            runner.record_graphs(8, TapeRecorder())
        config = EngineConfig(
            model=LAYOUT,
            socket_path="unused",
            max_num_seqs=8,
            # with overlap most prompts are longer than a step
            max_num_batched_tokens=12 if has_overlap else 24,
            max_num_batched_images=2,
            poison_freed_blocks=True,
            max_loras=max_loras,
            lora_host_bytes=ADAPTER_BYTES,
            speculative="ngram" if has_drafts else "none",
            plan_ahead=has_overlap,
        )
        self._has_more, self._has_overlap = has_drafts or has_overlap, has_overlap
        self.runner = runner
        self.engine = Engine(runner, config, self._receive)
        if has_drafts:
            time_all_steps_alike(self.engine.scheduler)
        self.report = Report()

    async def run(self) -> Report:
        """Send all requests, wait for all answers, check all of them."""
        running = asyncio.create_task(self.engine.run())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._send_all()
                while self._open:
                    await self._change()
        finally:
            running.cancel()
            self.engine.close(EngineDeadError("over"))
        self._check_pools()
        self._check_answers()
        return self.report

    async def _send_all(self) -> None:
        for number in range(self._num_requests):
            is_few = self._has_overlap and number // STRETCH % 4 > 0
            most = FEW_OPEN if is_few else MAX_OPEN
            while len(self._open) >= most or (self._open and self._rng.random() < 0.3):
                self._abort_one()
                self._unload_one()
                if self._open:  # the abort may have ended the last
                    await self._change()
            self._add(self._draw(number))
            if number == self._num_requests // 5:
                self.report.rss_early = _resident_bytes()
        self.report.rss_late = _resident_bytes()

    def _add(self, request: AddRequest) -> None:
        for request_id in request.answer_ids:
            self._answers[request_id] = Answer()
            self._open.add(request_id)
        refs = [image.ref for image in request.images if isinstance(image, ImageTiles)]
        self.engine.add(1, replace(request, images=refs))

    def _reply(self, question: NeedImage) -> None:
        """Send the tiles of an image, as a worker does while its request is open."""
        request = self._draw(int(question.request_id.removeprefix("r")))
        if self._open.isdisjoint(request.answer_ids):
            return
        self.report.num_images_sent += 1
        (image, *_) = (one for one in request.images if one.content_hash == question.content_hash)
        assert isinstance(image, ImageTiles)
        for offset in range(0, len(image.data), PIECE_BYTES):
            data = image.data[offset : offset + PIECE_BYTES]
            piece = ImagePiece(question=question.question, offset=offset, data=data)
            self.engine.receive(1, piece)

    def _abort_one(self) -> None:
        """Now and then a client leaves, whatever its request is just doing."""
        if self._open and self._rng.random() < 0.05:
            self.engine.abort(1, [str(self._rng.choice(sorted(self._open)))])

    def _unload_one(self) -> None:
        """Now and then an adapter is unloaded, and read again for the next request."""
        ref = self._refs[self._rng.integers(len(self._refs))] if self._rng.random() < 0.2 else None
        if ref is not None:
            unloading = asyncio.create_task(self.engine.unload_adapter(ref.digest))
            self._unloading.add(unloading)
            unloading.add_done_callback(self._unloading.discard)

    async def _change(self) -> None:
        """Return when something came back."""
        self._changed.clear()
        await self._changed.wait()

    def _receive(self, worker_id: int, message: FromEngine) -> None:
        assert worker_id == 1
        self._changed.set()
        if isinstance(message, NeedImage):
            delay_s = float(self._rng.choice([0.0, 0.0, 0.02]))
            asyncio.get_running_loop().call_later(delay_s, self._reply, message)
        elif isinstance(message, RequestFailed):
            self._end(message.request_id, message.kind)
        elif isinstance(message, StepOutputs):
            for output in message.outputs:
                answer = self._answers[output.request_id]
                assert answer.ending is None, "an output after the last one"
                answer.token_ids += output.token_ids
                if output.finish_reason is not None:
                    self._end(output.request_id, output.finish_reason)

    def _end(self, request_id: str, ending: str) -> None:
        assert self._answers[request_id].ending is None, "two final messages"
        self._answers[request_id].ending = ending
        self._open.remove(request_id)

    # What a request is, and what it must answer

    def _draw(self, number: int) -> AddRequest:
        rng, name = np.random.default_rng([self._seed, number % NUM_DISTINCT]), f"r{number}"
        num_images = int(rng.choice([0, 0, 1, 1, 2, 3]))
        letters = list("abcdefgh"[: rng.integers(1, 9)]) + ["|"] * num_images
        text = "shared start " * int(rng.integers(0, 2)) + "".join(rng.permutation(letters)) + "?"
        request = prompt(name, text, [_picture(rng) for _ in range(num_images)])
        greedy = rng.random() < 0.7
        sampling = SamplingParams(
            temperature=0.0 if greedy else 0.9,
            top_p=float(rng.choice([1.0, 0.9])),
            seed=int(rng.integers(1000)),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.2])) if not greedy else 1.0,
        )
        drawn = AddRequest(
            request_id=name,
            prompt_token_ids=request.token_ids,
            images=request.images,
            spans=request.spans,
            sampling=sampling,
            max_tokens=int(rng.integers(1, 20)),
            tenant=str(rng.choice(["", "t"])),
            choice_ids=[f"{name}-{i}" for i in range(1, int(rng.choice([1, 1, 1, 2, 4])))],
            priority=int(rng.choice([0, 0, 0, 1])),
            adapter=self._refs[rng.integers(len(self._refs))],
        )
        return with_more(drawn, rng) if self._has_more else drawn

    def _check_pools(self) -> None:
        scheduler = self.engine.scheduler
        scheduler.check()
        assert scheduler.snapshot().text.used == 0
        assert scheduler.snapshot().images.used == 0
        assert scheduler.tiles.num_images == scheduler.tiles.num_bytes == 0
        assert self.engine.stats().num_waiting == self.engine.stats().num_running == 0
        stats = self.engine.stats()
        self.report.num_preemptions = stats.num_preemptions
        self.report.num_evictions = stats.image_cache_evictions
        self.report.num_image_hits = stats.image_cache_hits
        self.report.num_prefix_hits = stats.prefix_tokens_hit
        self.report.num_draft_tokens = stats.num_draft_tokens
        self.report.num_accepted_tokens = stats.num_accepted_tokens
        self.report.num_passes_started = self.runner.next_pass.num_started
        self.report.num_passes_used = self.runner.next_pass.num_used
        self.report.num_chunk_passes_used = self.runner.next_pass.num_chunks_used
        if self.runner.adapters is not None:
            self.report.num_slot_loads = self.runner.adapters.num_loads

    def _check_answers(self) -> None:
        alone = runner_on(ROOMY_POOLS, len(self._refs))
        for first in range(min(NUM_DISTINCT, self._num_requests)):
            requests = [self._draw(i) for i in range(first, self._num_requests, NUM_DISTINCT)]
            for place, solo in enumerate(solos_of(requests[0])):
                ids = [request.answer_ids[place] for request in requests]
                self._check_alike(solo, ids, alone)

    def _check_alike(self, request: AddRequest, ids: list[str], alone: ModelRunner) -> None:
        """Check the answers to a request that was sent several times."""
        solo = solo_of(alone, request)
        solo.run()
        expected = solo.generated(request.request_id)
        for request_id in ids:
            answer = self._answers[request_id]
            endings = ("length", "abort", "stop") if self._has_more else ("length", "abort")
            assert answer.ending in endings, f"{request_id}: {answer.ending}"
            self.report.endings[answer.ending] += 1
            self._check_answer(request, answer, expected, alone)

    def _check_answer(
        self, request: AddRequest, answer: Answer, expected: list[int], alone: ModelRunner
    ) -> None:
        if answer.ending == "abort":
            expected = expected[: len(answer.token_ids)]
        is_other = answer.token_ids != expected
        is_oracles = request.sampling.is_greedy and is_plain(request)
        if is_other and not is_oracles:
            self._excuse(solo_of(alone, request), request, answer, expected)
        elif is_other or (request.adapter is not None and is_oracles):
            key = (request.request_id, *answer.token_ids)
            if key not in self._excuses:
                self._excuses[key] = oracles_excuses(request, answer.token_ids)
            self.report.num_excuses += self._excuses[key]
            self.report.num_adapted += request.adapter is not None

    def _excuse(
        self, solo: SteppedEngine, request: AddRequest, answer: Answer, expected: list[int]
    ) -> None:
        """Count an answer whose first other token was chosen by rounding. Asserts that it was."""
        with recorded_gaps() as gaps:
            solo.run()
        pairs = enumerate(zip(answer.token_ids, expected, strict=False))
        place = next(place for place, (one, other) in pairs if one != other)
        most = EXCUSED_GAP if request.sampling.is_greedy else EXCUSED_DRAW
        message = f"{request.request_id}: {answer.token_ids}, alone {expected}, {gaps[place]}"
        assert gaps[place] <= most, message
        self.report.num_excuses += 1


def oracles_excuses(request: AddRequest, token_ids: list[int]) -> int:
    """How many of a plain greedy answer's tokens are the second best of transformers' model."""
    whole = prompt(request.request_id, "x")
    whole.token_ids, whole.images = request.prompt_token_ids, request.images
    whole.spans = request.spans
    model = None if request.adapter is None else merged(request.adapter.name)
    return count_excuses(LAYOUT, whole, token_ids, model)


def solo_of(alone: ModelRunner, request: AddRequest) -> SteppedEngine:
    """An engine with this request alone, ready to run: no caches, no drafts."""
    solo = SteppedEngine(alone, {"prefix_cache": False, "image_cache": False, "max_loras": 1})
    solo.add(request)
    sequence = solo.sequences[request.request_id]
    if request.adapter is not None:
        assert alone.adapters is not None
        solo.scheduler.make_ready(sequence, alone.adapters.read(request.adapter))
    if request.grammar is not None:
        matcher = alone.compile_grammar(request.grammar, request.eos_token_ids)
        solo.scheduler.make_ready(sequence, matcher)
    return solo


def runner_on(
    pools: PoolSizes, max_loras: int, backend: TapedTorchBackend | None = None
) -> ModelRunner:
    """A runner of the model; with room for adapters if max_loras is not 0."""
    limits = AdapterLimits(max_loras, MAX_RANK, torch.float32) if max_loras else None
    runner = ModelRunner(loaded(LAYOUT), PoolPlan(pools, MAX_MODEL_LEN), backend, limits)
    runner.grammars = _grammars()
    return runner


@functools.cache
def _grammars() -> Grammars:
    """Of the bundled tokenizer: the layout has as many tokens, and no tokenizer."""
    return Grammars(bundled.CHECKPOINT, loaded(LAYOUT).text_config.vocab_size)


@functools.cache
def merged(name: str) -> MllamaForConditionalGeneration:
    """The oracle with an adapter in its weights."""
    return MIXED[name].merged(oracle(LAYOUT))


def solos_of(request: AddRequest) -> list[AddRequest]:
    """One request for each choice that asks for it alone, by the seed that it is given."""
    return [
        replace(request, request_id=one.request_id, sampling=one.sampling, choice_ids=[])
        for one in Sequence.of(1, request)
    ]


def _picture(rng: np.random.Generator) -> ImageTiles:
    """One of a few, or one that nobody sent before."""
    is_recurring = rng.random() < 0.6
    number = int(rng.integers(NUM_RECURRING) if is_recurring else rng.integers(10**6, 10**9))
    return image(1 + number % 8, number)


def _resident_bytes() -> int:
    """The memory that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as fields:
        return int(fields.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
