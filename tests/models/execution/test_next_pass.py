"""The next step's pass, started before its tokens are on the host: the same answers, and its use.

Eager passes stand in for recorded ones, which tests/models/execution/test_decode_graphs.py compares
with them. test_next_chunk.py has passes with chunks of prompts.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch
from support.eager_graphs import ALIKE, EagerGraphs, engine
from support.oracle import GREEDY, count_excuses, image, loaded, prompt, random_request
from support.stepped import MAX_MODEL_LEN, SteppedEngine, message
from support.taped import TapedTorchBackend, TapeRecorder

from vlmserve.models import device_copies
from vlmserve.models.batch import PoolSizes, SamplingParams, StepBatch
from vlmserve.models.device_copies import Download
from vlmserve.models.execution.next_pass import NextPass, StartedPass
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.pool_sizes import PoolPlan
from vlmserve.models.kv_cache.step_tensors import Hidden
from vlmserve.models.sampling import sampler


@pytest.mark.parametrize("layout", [pytest.param("tiny", marks=pytest.mark.slow), "cross-first"])
def test_greedy_tokens_equal_the_oracle_under_arrivals_aborts_and_preemption(layout: str) -> None:
    """Blocks are freed and given to others while a pass that was started still writes them."""
    rng, running = np.random.default_rng(3), engine(layout)
    requests = [random_request(rng, str(i), GREEDY) for i in range(48)]
    waiting, excuses = list(requests), 0
    aborts = {str(i) for i in range(0, 48, 3)}
    while waiting or running.scheduler.has_work:
        if rng.random() < (0.4 if len(waiting) > 24 else 0.1):  # crowded, then not
            for _ in range(min(len(waiting), int(rng.integers(0, 4)))):
                running.add(message(waiting.pop(0), max_tokens=int(rng.integers(1, 30))))
        for name in sorted(aborts & running.sequences.keys()):
            if rng.random() < 0.1:
                running.abort(name)
        running.step()
    for request in requests:
        excuses += count_excuses(layout, request, running.generated(request.request_id))
    runner: Any = running.runner
    assert excuses <= 1
    assert running.scheduler.snapshot().num_preemptions > 0
    assert (
        20 < runner.next_pass.num_used < runner.next_pass.num_started
    )  # some were not the next step
    running.assert_all_free()


def sampled_alone(plans_ahead: bool) -> tuple[list[list[int]], SteppedEngine]:
    """The tokens of four texts with penalties and sampling, some of which end early."""
    running = engine(pools=PoolSizes(64, 4, 4))
    running.plans_ahead = plans_ahead
    for i in range(4):
        request = prompt(str(i), "ab c"[: i + 1])
        request.sampling = SamplingParams(
            temperature=0.9, top_p=0.9, seed=i, repetition_penalty=1.3, num_logprobs=2
        )
        running.add(message(request, max_tokens=8 + 8 * i))
    running.run()
    return [running.generated(str(i)) for i in range(4)], running


def test_sampled_tokens_are_those_without_and_nearly_every_step_was_started() -> None:
    expected, _ = sampled_alone(plans_ahead=False)
    actual, running = sampled_alone(plans_ahead=True)
    assert actual == expected
    runner: Any = running.runner
    # of 32 steps: the prompts' has none before it, nor have those after an end that was foreseen
    assert runner.next_pass.num_started == runner.next_pass.num_used == 31 - 4 + 1


def test_no_pass_is_started_while_a_request_waits() -> None:
    running = engine()
    running.add(message(prompt("a", "ab"), max_tokens=20))
    running.step()
    runner: Any = running.runner
    execute = runner.execute

    def arriving(batch: StepBatch, on_launch: Any) -> Any:
        def launched() -> None:
            on_launch()
            running.add(message(prompt("b", "ab"), max_tokens=20))

        return execute(batch, launched)

    runner.execute = arriving
    before = runner.next_pass.num_started
    running.step()
    assert runner.next_pass.num_started == before


def test_a_pass_is_used_for_its_own_rows_and_tokens_alone() -> None:
    running = engine()
    for name in ("a", "b"):
        running.add(message(prompt(name, "ab"), max_tokens=20))
    running.step()
    runner: Any = running.runner
    started: StartedPass = runner.next_pass._started
    batch = running.scheduler.schedule()
    assert batch is not None
    first, second = batch.sequences
    assert started.of(batch) is started.hidden
    alone = started.of(StepBatch([second]))
    assert alone is not None
    assert torch.equal(alone.of_sampled(), started.hidden.states[1:])
    assert started.of(StepBatch([first, second], freed_text_blocks=[3])) is None
    assert started.of(StepBatch([first, second], loads={(1,): memoryview(b"")})) is None
    second.token_ids = [second.token_ids[0] + 1]
    assert started.of(batch) is None


def test_a_pass_is_started_before_its_tokens_are_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was started behind the copy of the tokens, for which the device waited."""
    events: list[str] = []
    wait, replay = Download.wait, EagerGraphs.replay_staged

    def waiting(download: Download) -> Any:
        events.append("tokens")
        return wait(download)

    def replaying(*args: Any) -> Hidden:
        events.append("pass")
        return replay(*args)

    monkeypatch.setattr(Download, "wait", waiting)
    monkeypatch.setattr(EagerGraphs, "replay_staged", replaying)
    running = engine()
    running.add(message(prompt("a", "ab"), max_tokens=6))
    running.run()
    assert events == ["pass", "tokens"] * 5 + ["tokens"]
    assert running.runner.next_pass.num_used == 5


def flat(plans_ahead: bool) -> tuple[list[list[int]], SteppedEngine]:
    """The tokens of two texts: the cut of one is outside the window in most steps."""
    running = engine(pools=PoolSizes(64, 4, 4))
    running.plans_ahead = plans_ahead
    wide = SamplingParams(temperature=2.0, top_p=0.9, seed=1)
    for name, sampling in (("a", wide), ("b", SamplingParams(seed=2))):
        request = prompt(name, "ab c")
        request.sampling = sampling
        running.add(message(request, max_tokens=24))
    running.run()
    return [running.generated(name) for name in "ab"], running


def test_tokens_that_are_drawn_again_are_not_those_of_an_early_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The early pass had no token of that row. From then on passes start behind the tokens."""
    monkeypatch.setattr(sampler, "WINDOW", 600)  # of 768
    expected, _ = flat(plans_ahead=False)
    actual, running = flat(plans_ahead=True)
    assert actual == expected
    counts: Any = running.runner.next_pass
    assert counts.num_used == 23
    assert 23 < counts.num_started < 2 * 23, "no early pass was thrown away, or every one"


class SlowDownload:
    """A copy that arrives after the third look."""

    def __init__(self) -> None:
        self.num_looks = 0

    @property
    def is_done(self) -> bool:
        self.num_looks += 1
        return self.num_looks > 3


def test_the_runner_waits_for_the_next_rows_no_longer_than_for_the_tokens() -> None:
    counts, download = NextPass(), SlowDownload()
    counts._wait_prepared(download)  # type: ignore[arg-type]
    assert download.num_looks == 4
    threading.Timer(0.01, counts.prepare, [None]).start()
    endless: Any = SimpleNamespace(is_done=False)
    counts._wait_prepared(endless)
    counts.take()
    assert not counts._is_prepared.is_set()


class FakeEvent:
    """A CUDA event that notes what happens with it."""

    log: ClassVar[list[str]] = []

    def record(self, stream: object) -> None:
        self.log.append(f"record on {stream}")

    def query(self) -> bool:
        return "synchronize" in self.log

    def synchronize(self) -> None:
        self.log.append("synchronize")


def test_a_download_waits_for_its_own_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for the stream, and so for the pass that was started behind the copy."""
    event = FakeEvent()
    monkeypatch.setattr(
        device_copies, "_to_host", lambda tensor: (event.record("x"), (tensor.numpy(), event))[1]
    )
    download = Download([torch.tensor([3, 4])])
    assert event.log == ["record on x"]
    assert not download.is_done
    assert download.wait()[0].tolist() == [3, 4]
    assert event.log == ["record on x", "synchronize"]
    assert download.is_done


def test_passes_replayed_from_a_tape_give_the_same_tokens() -> None:
    """Greedy with a penalty, seeded, and with a picture; one ends by a stop token."""
    answers = []
    for plans_ahead in (False, True):
        plan = PoolPlan(PoolSizes(64, 8, 4), MAX_MODEL_LEN)
        runner = ModelRunner(loaded("tiny"), plan, TapedTorchBackend())
        runner.record_graphs(4, TapeRecorder())
        running = SteppedEngine(runner, plans_ahead=plans_ahead)
        for name, text, images in (
            ("a", "ab c", []),
            ("b", "what", []),
            ("c", "a|", [image(2, 1)]),
        ):
            request = prompt(name, text, images)
            request.sampling = ALIKE[name]
            stops = answers[0]["b"][5:6] if name == "b" and answers else []
            asked = msgspec.structs.replace(message(request, max_tokens=14), stop_token_ids=stops)
            running.add(asked)
        running.run()
        running.assert_all_free()
        answers.append({name: running.generated(name) for name in "abc"})
    assert runner.next_pass.num_used >= 11
    expected, actual = answers
    assert actual["b"] == expected["b"][: len(actual["b"])]
    assert len(actual["b"]) <= 6
    assert [actual[name] for name in "ac"] == [expected[name] for name in "ac"]
