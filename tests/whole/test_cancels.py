"""Clients that leave, at every stage of a request: nothing of it stays.

In one process, where a whole round can be held at its stage and the time until it is free be
taken; `tests/whole/test_server_faults.py` and `test_torture` have clients leave whole servers.
"""

import asyncio
import json
import os

import pytest
from support.cancels import FREED_S, STAGES, Cancels, figures
from support.invariants import SLACK

# `make torture` runs as many; pieces of it, where a run must be short.
NUM_CANCELS = int(os.environ.get("TORTURE_CANCELS", "100000"))


def run(folder, count, size):
    async def scenario():
        async with Cancels(folder, size) as cancels:
            return await cancels.run(count)

    return asyncio.run(scenario())


@pytest.mark.parametrize("stage", STAGES)
def test_row_49_clients_that_leave_free_everything_at_once_whatever_stage(tmp_path, stage):
    async def scenario():
        async with Cancels(tmp_path, 8) as cancels:
            await cancels.round(stage)
            await cancels.round(stage)
            return cancels.report

    report = asyncio.run(scenario())
    assert report.left[stage] == 16
    assert max(report.freed_s) < FREED_S * SLACK


def test_row_49_hundreds_of_cancels_lose_no_block_reference_or_descriptor(tmp_path):
    report = run(tmp_path, 600, 20)
    assert set(report.left) == set(STAGES)
    before, after = report.descriptors
    assert after <= before


@pytest.mark.torture
def test_a_hundred_thousand_cancels_lose_no_block_reference_or_descriptor(tmp_path):
    report = run(tmp_path, NUM_CANCELS, 32)
    print(json.dumps(figures(report)))
    before, after = report.descriptors
    assert after <= before
