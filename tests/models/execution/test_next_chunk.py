"""Steps that continue a prompt beside decodes, started before the last tokens are on the host."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from support.eager_graphs import ALIKE, engine
from support.oracle import GREEDY, image, prompt
from support.stepped import SteppedEngine, message

from vlmserve.models.batch import PoolSizes, SamplingParams
from vlmserve.models.device_copies import Download
from vlmserve.models.execution.runner import ModelRunner
from vlmserve.models.kv_cache.step_tensors import Hidden

LONG = "a question that is far longer than a step's tokens"


def test_a_chunk_is_started_before_the_tokens_beside_it_are_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    wait, start = Download.wait, ModelRunner._start

    def waiting(download: Download) -> Any:
        events.append("tokens")
        return wait(download)

    def starting(*args: Any) -> Hidden:
        events.append("chunk")
        return start(*args)

    running = engine(pools=PoolSizes(64, 4, 4), max_num_batched_tokens=12)
    running.add(message(prompt("a", "ab"), max_tokens=20))
    running.step()
    running.add(message(prompt("d", LONG[:40]), max_tokens=2))
    monkeypatch.setattr(Download, "wait", waiting)
    monkeypatch.setattr(ModelRunner, "_start", starting)
    for _ in range(4):  # of 11, 11, 11 and 7 tokens
        running.step()
    assert events == ["chunk", "tokens"] * 3 + ["tokens"]
    assert running.runner.next_pass.num_chunks_used == 3


def beside_chunks(plans_ahead: bool, stop: int = 0) -> tuple[dict[str, list[int]], SteppedEngine]:
    """Three answers beside which two long prompts are computed, one with a picture before it."""
    running = engine(pools=PoolSizes(80, 8, 4), max_num_batched_tokens=12)
    running.plans_ahead = plans_ahead
    for name, text in zip("abc", ("ab c", "what", "or"), strict=True):
        request = prompt(name, text)
        request.sampling = ALIKE[name]
        stops = [stop] if name == "b" and stop else []
        asked = message(request, max_tokens=20)
        running.add(msgspec.structs.replace(asked, stop_token_ids=stops))
    running.step()
    for name, text, images in (("d", LONG, []), ("e", "|" + LONG[:30], [image(2, 1)])):
        request = prompt(name, text, images)
        request.sampling = GREEDY if name == "d" else SamplingParams(temperature=0.8, seed=7)
        running.add(message(request, max_tokens=9))
        while not running.generated(name):
            running.step()
    running.run()
    running.assert_all_free()
    return {name: running.generated(name) for name in "abcde"}, running


def assert_used(stop: int = 0) -> dict[str, list[int]]:
    """The chunks that were started ahead are used and change no token. Returns the tokens."""
    expected, _ = beside_chunks(plans_ahead=False, stop=stop)
    actual, running = beside_chunks(plans_ahead=True, stop=stop)
    assert actual == expected
    counts: Any = running.runner.next_pass
    # of 81 tokens, about nine a step, all but the steps that admit d and e
    assert counts.num_chunks_used >= 7
    assert counts.num_used == counts.num_started - 2
    return actual


def test_chunks_beside_decodes_are_started_ahead_and_change_no_token() -> None:
    """Also the last of a prompt, behind which a token is sampled."""
    assert_used()


def test_a_chunk_that_was_started_is_used_when_an_answer_beside_it_has_ended() -> None:
    """The token that the answer leaves is not given to the chunk, which would be another one."""
    plain, _ = beside_chunks(plans_ahead=False)
    stop = plain["b"][4]
    assert len(assert_used(stop)["b"]) == 5


def test_a_chunk_that_was_started_for_an_aborted_request_changes_no_other_answer() -> None:
    expected, _ = beside_chunks(plans_ahead=False)
    running = engine(pools=PoolSizes(32, 8, 4), max_num_batched_tokens=12)
    for name, text in zip("abc", ("ab c", "what", "or"), strict=True):
        request = prompt(name, text)
        request.sampling = ALIKE[name]
        running.add(message(request, max_tokens=20))
    running.step()
    counts: Any = running.runner.next_pass
    for number in range(4):
        running.add(message(prompt(f"d{number}", f"{number} {LONG}"), max_tokens=9))
        running.step()
        running.step()
        started = counts._started
        assert started is not None
        assert started.has_chunks
        running.abort(f"d{number}")
        running.step()
    running.run()
    assert {name: running.generated(name) for name in "abc"} == {
        name: expected[name] for name in "abc"
    }
    assert counts.num_used >= 12
    running.assert_all_free()


def test_a_pass_that_finds_no_memory_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = beside_chunks(plans_ahead=False)

    def start(*args: Any) -> Hidden:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ModelRunner, "_start", start)
    actual, running = beside_chunks(plans_ahead=True)
    assert actual == expected
    counts: Any = running.runner.next_pass
    assert counts.num_chunks_used == 0
    assert counts.num_used == counts.num_started - 2 > 0
