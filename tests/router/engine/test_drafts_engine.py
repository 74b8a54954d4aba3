"""`--speculative ngram` through the engine and its socket."""

from __future__ import annotations

import asyncio

import pytest
from support.engine_rig import engine_of, request_of, tokens_of
from support.fake_runner import FakeRunner, expected_token_ids
from support.stepped import time_all_steps_alike

from vlmserve.router.config import EngineConfig


@pytest.mark.parametrize("speculative", ["none", "ngram"])
def test_the_option_changes_the_steps_and_not_the_answer(tmp_path, speculative: str) -> None:
    async def run() -> None:
        runner = FakeRunner(repeats=True)
        async with engine_of(tmp_path, runner, speculative=speculative) as rig:
            time_all_steps_alike(rig.engine.scheduler)
            request = request_of("a", prompt=(1, 2, 3) * 4, max_tokens=40)
            found = await tokens_of(await rig.connect(), request)
            assert found == expected_token_ids(request, repeats=True)
            stats = rig.engine.stats()
            assert stats.num_steps == runner.num_steps == 40 - stats.num_accepted_tokens
            assert stats.num_draft_tokens == runner.num_drafts
            assert (stats.num_accepted_tokens > 5) == (speculative == "ngram")
            assert (stats.num_drafts > 5) == (speculative == "ngram")

    asyncio.run(run())


def test_the_number_of_drafts_counts_only_with_the_option() -> None:
    config = EngineConfig(model="m", socket_path="s", num_speculative_tokens=3)
    assert config.max_drafts == 0
    with_drafts = EngineConfig(
        model="m", socket_path="s", num_speculative_tokens=3, speculative="ngram"
    )
    assert with_drafts.max_drafts == 3
