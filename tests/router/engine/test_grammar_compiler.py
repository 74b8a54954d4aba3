"""Grammars in the engine: compiled beside the loop, a matcher a sequence, none fails others."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
from support.fake_runner import FakeRunner, expected_token_ids
from support.polling import until
from support.sampled import sample

from vlmserve.models.batch import SamplingParams, StepBatch, TokenMatcher
from vlmserve.models.bundled import CHECKPOINT
from vlmserve.models.errors import GrammarError
from vlmserve.models.grammar import MAX_COMPILED, MAX_COMPILED_BYTES, Grammars, Matcher
from vlmserve.models.sampling.sampler import Masks
from vlmserve.router.config import EngineConfig
from vlmserve.router.engine.engine import DuplicateRequestError, Engine
from vlmserve.router.errors import EngineDeadError
from vlmserve.router.messages import AddRequest, FromEngine, RequestFailed, StepOutputs
from vlmserve.server.structured_output.grammar_text import choice_grammar, regex_grammar

DEADLINE_S = 120.0
EOS = [753]


class CountingMatcher:
    """Fails at its n-th token; n of 0 never."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at = fails_at
        self.num_tokens = 0

    @property
    def has_failed(self) -> bool:
        return 0 < self.fails_at <= self.num_tokens

    def accept(self, token_id: int) -> None:
        self.num_tokens += 1

    def copy(self) -> CountingMatcher:
        return CountingMatcher(self.fails_at)

    def num_allowed(self, token_ids: list[int]) -> int:
        return len(token_ids)

    def forced(self) -> list[int]:
        return []


class GrammarRunner(FakeRunner):
    """Compiles the grammar "slow" when it is let, "bad" never, "3" to a matcher that fails then."""

    def __init__(self) -> None:
        super().__init__()
        self.may_compile = threading.Event()
        self.is_compiling = threading.Event()
        self.compiled: list[str] = []
        self.tenants: list[str] = []

    def compile_grammar(self, grammar: str, eos_token_ids: list[int], tenant: str) -> TokenMatcher:
        self.compiled.append(grammar)
        self.tenants.append(tenant)
        if grammar == "bad":
            raise ValueError("it is bad")
        if grammar == "slow":
            self.is_compiling.set()
            assert self.may_compile.wait(DEADLINE_S)
        return CountingMatcher(int(grammar) if grammar.isdigit() else 0)


class Bench:
    """An engine on that runner, and what it sent, by request id."""

    def __init__(self, **options) -> None:
        self.runner = GrammarRunner()
        config = EngineConfig(model="fake", socket_path="", **options)
        self.engine = Engine(self.runner, config, self._receive)
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, str] = {}
        self._changed = asyncio.Event()

    def _receive(self, worker_id: int, message: FromEngine) -> None:
        if isinstance(message, RequestFailed):
            self._end(message.request_id, f"{message.kind}: {message.message}")
        elif isinstance(message, StepOutputs):
            for output in message.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    self._end(output.request_id, output.finish_reason)
        self._changed.set()

    def _end(self, request_id: str, ending: str) -> None:
        assert request_id not in self.endings, "two final messages"
        self.endings[request_id] = ending

    async def until(self, *request_ids: str) -> None:
        while not set(request_ids) <= set(self.endings):
            self._changed.clear()
            await self._changed.wait()


def request_of(name: str, grammar: str | None = None, **fields: object) -> AddRequest:
    fields = {"max_tokens": 5, "sampling": SamplingParams(seed=1)} | fields
    return AddRequest(request_id=name, prompt_token_ids=[1, 2, 3], grammar=grammar, **fields)


def run(scenario, **options) -> Bench:
    """Play a scenario on an engine; options are fields of EngineConfig."""

    async def whole() -> Bench:
        bench = Bench(**options)
        running = asyncio.create_task(bench.engine.run())
        try:
            async with asyncio.timeout(DEADLINE_S):
                await scenario(bench)
        finally:
            bench.runner.may_compile.set()
            running.cancel()
            bench.engine.close(EngineDeadError("over"))
        assert bench.engine.scheduler.snapshot().text.used == 0
        assert len(bench.engine.scheduler.queue) == 0
        assert bench.engine.snapshot().scheduler.waiting_tokens == 0
        return bench

    return asyncio.run(whole())


def test_others_are_answered_while_a_grammar_is_compiled():
    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("slow", "slow"))
        await asyncio.to_thread(bench.runner.is_compiling.wait, DEADLINE_S)
        bench.engine.add(1, request_of("plain"))
        await bench.until("plain")
        assert "slow" not in bench.endings
        bench.runner.may_compile.set()
        await bench.until("slow")

    bench = run(scenario)
    expected = expected_token_ids(request_of("any"))
    assert bench.tokens == {"plain": expected, "slow": expected}


def test_what_is_aborted_while_its_grammar_is_compiled_ends_once():
    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("slow", "slow", choice_ids=["second"]))
        await asyncio.to_thread(bench.runner.is_compiling.wait, DEADLINE_S)
        with pytest.raises(DuplicateRequestError):
            bench.engine.add(1, request_of("second"))
        bench.engine.abort(1, ["slow"])
        bench.runner.may_compile.set()
        await bench.until("slow", "second")

    bench = run(scenario)
    assert bench.endings == {"slow": "abort", "second": "length"}
    assert len(bench.tokens["second"]) == 5


def test_a_worker_that_goes_takes_its_compiling_requests_along():
    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("slow", "slow"))
        await asyncio.to_thread(bench.runner.is_compiling.wait, DEADLINE_S)
        bench.engine.drop_worker(1)
        bench.runner.may_compile.set()
        await bench.until("slow")

    assert run(scenario).endings == {"slow": "abort"}


@pytest.mark.parametrize("left", [["first", "second"], ["second", "first"]])
def test_who_leaves_while_grammars_are_compiled_is_freed_at_once_and_compiled_no_more(left):
    """Its prompt and pictures stayed until its grammar was compiled, and counted nowhere."""

    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("slow", "slow"))
        await asyncio.to_thread(bench.runner.is_compiling.wait, DEADLINE_S)
        bench.engine.add(1, request_of("first", "next", choice_ids=["second"]))
        assert bench.engine.stats().num_waiting == 3
        bench.engine.abort(1, left)
        assert bench.endings == {"first": "abort", "second": "abort"}
        assert (bench.engine.stats().num_waiting, bench.engine.scheduler.queue.num_tokens) == (1, 3)
        bench.runner.may_compile.set()
        await bench.until("slow")
        bench.engine.add(1, request_of("last", "last"))
        await bench.until("last")

    assert run(scenario).runner.compiled == ["slow", "last"]


def test_what_waits_for_its_grammar_counts_against_the_queue_s_limits():
    """Requests whose grammars were being compiled were bounded by their number alone."""

    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("slow", "slow"))
        await asyncio.to_thread(bench.runner.is_compiling.wait, DEADLINE_S)
        bench.engine.add(1, request_of("next", "next"))
        bench.engine.add(1, request_of("refused", "refused"))
        bench.engine.add(1, request_of("plain"))
        bench.runner.may_compile.set()
        await bench.until("slow", "next", "refused", "plain")

    bench = run(scenario, max_queue_tokens=8)
    assert bench.runner.compiled == ["slow", "next"]
    for name in ("refused", "plain"):
        assert bench.endings[name].startswith("queue_full: ")
        assert "9 prompt tokens would wait, the limit is 8" in bench.endings[name]


def test_a_prompt_that_can_never_run_is_refused_before_its_grammar_is_compiled():
    async def scenario(bench: Bench) -> None:
        bench.engine.add(
            1, AddRequest(request_id="a", prompt_token_ids=[], max_tokens=1, grammar="b")
        )
        await bench.until("a")

    bench = run(scenario)
    assert bench.endings["a"].startswith("invalid: the prompt has no tokens")
    assert bench.runner.compiled == []


def test_a_request_keeps_its_place_while_its_grammar_is_compiled():
    may_step = threading.Event()

    def hold(batch: StepBatch) -> None:
        assert may_step.wait(DEADLINE_S)

    async def scenario(bench: Bench) -> None:
        bench.runner.before_step = hold
        bench.engine.add(1, request_of("running"))
        bench.engine.add(1, request_of("slow", "slow"))
        bench.engine.add(1, request_of("later"))
        bench.runner.may_compile.set()
        await until(lambda: bench.engine.scheduler.queue.peek().request_id == "slow")
        may_step.set()
        await bench.until("running", "slow", "later")

    bench = run(scenario, max_num_seqs=1)
    assert list(bench.endings) == ["running", "slow", "later"]


def test_a_grammar_that_is_none_is_refused_for_every_choice():
    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("bad", "bad", choice_ids=["worse"]))
        await bench.until("bad", "worse")

    endings = run(scenario).endings
    assert endings["bad"] == endings["worse"]
    assert endings["bad"].startswith("invalid: the grammar cannot be compiled: it is bad")


def test_a_matcher_that_fails_ends_its_request_alone():
    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("fails", "3", choice_ids=["fails too"]))
        bench.engine.add(1, request_of("goes on", "0"))
        bench.engine.add(1, request_of("plain"))
        await bench.until("fails", "fails too", "goes on", "plain")

    bench = run(scenario)
    assert bench.endings == {
        "fails": "abort",
        "fails too": "abort",
        "goes on": "length",
        "plain": "length",
    }


def allowed_by(one: Grammars, matcher: Matcher) -> np.ndarray:
    """Which tokens the matcher allows, bool [768]."""
    return np.unpackbits(one.fill([matcher]), axis=1, bitorder="little")[0, :768].astype(bool)


def packed(allowed: np.ndarray) -> np.ndarray:
    return np.packbits(allowed, axis=1, bitorder="little")


def grammars() -> Grammars:
    return Grammars(CHECKPOINT, vocab_size=768)


def test_a_mask_allows_what_the_grammar_does_and_the_end_when_it_is_complete():
    one = grammars()
    matcher = one.compile(regex_grammar("a|bc"), EOS)
    allowed = allowed_by(one, matcher)
    names = {one._tokenizer(tuple(EOS)).decode_str([i]) for i in np.flatnonzero(allowed).tolist()}
    assert {"a", "b"} <= names <= {"a", "b", "bc"}
    matcher.accept(
        next(
            i
            for i in np.flatnonzero(allowed).tolist()
            if one._tokenizer(tuple(EOS)).decode_str([i]) == "a"
        )
    )
    assert np.flatnonzero(allowed_by(one, matcher)).tolist() == EOS


def test_copies_of_a_matcher_go_their_own_ways():
    one = grammars()
    first = one.compile(regex_grammar("[ab]c"), EOS)
    second = first.copy()
    token = int(np.flatnonzero(allowed_by(one, first))[0])
    before = allowed_by(one, second)
    first.accept(token)
    assert (allowed_by(one, second) == before).all()
    assert not (allowed_by(one, first) == before).all()


def test_a_token_that_the_grammar_forbids_fails_the_matcher_and_allows_no_text_after():
    one = grammars()
    matcher = one.compile(regex_grammar("a"), EOS)
    matcher.accept(int(np.flatnonzero(~allowed_by(one, matcher))[0]))
    assert matcher.has_failed
    assert not matcher.is_in_dead_end
    assert np.flatnonzero(allowed_by(one, matcher)).tolist() == EOS[:1]


@pytest.mark.parametrize("grammar", ["a[^\\s\\S]", "[^\\s\\S]"])
def test_a_dead_end_allows_no_text(grammar):
    """An empty mask used to allow every token."""
    one = grammars()
    matcher = one.compile(regex_grammar(grammar), EOS)
    assert np.flatnonzero(allowed_by(one, matcher)).tolist() == EOS[:1]
    assert matcher.has_failed
    assert matcher.is_in_dead_end


def test_a_grammar_that_does_not_compile_says_why_in_one_line():
    with pytest.raises(GrammarError, match="regex") as failed:
        grammars().compile(regex_grammar("["), EOS)
    assert "\n" not in str(failed.value)


def test_compiled_grammars_are_kept_and_bounded():
    one = grammars()
    for number in range(MAX_COMPILED + 10):
        one.compile(regex_grammar(f"a{number}"), EOS)
    assert len(one._compiled) == MAX_COMPILED
    assert isinstance(one.compile(regex_grammar("a1"), EOS), Matcher)
    for number in range(20):
        one.compile(choice_grammar([f"{number} {i:04} and so on and so on" for i in range(1000)]))
    assert sum(len(text) for _, text, _ in one._compiled) <= MAX_COMPILED_BYTES


def test_row_38_a_compiled_grammar_serves_its_tenant_alone(monkeypatch):
    one, compiled = grammars(), []
    anew = one.compile_anew
    monkeypatch.setattr(one, "compile_anew", lambda *key: compiled.append(key) or anew(*key))
    for tenant in ("a", "b", "a"):
        one.compile(regex_grammar("a|bc"), EOS, tenant)
    assert len(compiled) == 2


def test_the_engine_has_a_grammar_compiled_for_the_tenant_that_sent_it():
    async def scenario(bench: Bench) -> None:
        bench.engine.add(1, request_of("a", "0", tenant="t"))
        await bench.until("a")

    assert run(scenario).runner.tenants == ["t"]


def test_masked_rows_draw_what_is_allowed_and_the_others_are_untouched():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    allowed = np.zeros((2, 10), dtype=bool)
    allowed[0, 4] = allowed[1, 7] = True
    params = [SamplingParams(temperature=0.0), SamplingParams(seed=3), SamplingParams(seed=4)]
    alone = sample(logits[1:2].clone(), params[1:2], [0])
    together = sample(logits.clone(), params, [0, 0, 0], masks=Masks([0, 2], packed(allowed)))
    assert together.tolist() == [4, int(alone[0]), 7]


def test_a_bias_against_all_that_a_grammar_allows_fails_nobody():
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(1))
    allowed = np.zeros((1, 10), dtype=bool)
    allowed[0, 4] = True
    params = [SamplingParams(logit_bias=tuple((token, -100.0) for token in range(10)))]
    assert sample(logits, params, [0], masks=Masks([0], packed(allowed))).tolist() == [4]
