"""Every Triton kernel through the real compiler and assembler, without a GPU, as launched.

The interpreter, which the other tests run kernels in, takes much that the compiler refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "support" / "compiled_kernels.py"
# Far off: for two capabilities it takes some minutes of one core.
TIMEOUT_S = 3_600
# shared memory of a block, by compute capability
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# of a thread: what the assembler cannot keep in registers costs traffic to memory
MAX_SPILLED_BYTES = 64


@pytest.fixture(
    scope="module",
    params=[
        # The least shared memory, and Hopper's instructions.
        pytest.param((89, 90), marks=pytest.mark.slow, id="two capabilities"),
        pytest.param(tuple(SHARED_BYTES), marks=pytest.mark.torture, id="all capabilities"),
    ],
)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the script writes about all launches."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, request.param)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert {one["capability"] for one in found["launches"]} == set(request.param)
    return found


def test_every_kernel_is_compiled_for_each_capability(document: dict[str, Any]) -> None:
    for capability in {one["capability"] for one in document["launches"]}:
        entries = [one for one in document["launches"] if one["capability"] == capability]
        assert sorted({one["kernel"] for one in entries}) == document["kernels"]


def test_every_launch_becomes_ptx(document: dict[str, Any]) -> None:
    failed = [one for one in document["launches"] if "error" in one]
    assert not failed, json.dumps(failed, indent=1)


def test_no_launch_takes_more_shared_memory_than_a_block_has(document: dict[str, Any]) -> None:
    for one in document["launches"]:
        assert one["shared_bytes"] <= SHARED_BYTES[one["capability"]], one


def test_registers_suffice(document: dict[str, Any]) -> None:
    for one in document["launches"]:
        assert one["spilled_bytes"] <= MAX_SPILLED_BYTES, one


def test_keys_and_values_are_loaded_while_others_are_multiplied(document: dict[str, Any]) -> None:
    """A round that waits for all of its loads reads nothing ahead, however wide they are."""
    entries = [one for one in document["launches"] if one["kernel"] == "attend_kernel"]
    assert entries
    for one in entries:
        assert one["left_in_flight"] >= 1, one


def test_a_decode_step_has_the_codes_of_several_rounds_in_flight(
    document: dict[str, Any],
) -> None:
    """A wait leaves two copies a round, of rows and of codes, of four rounds: 16 KiB of codes."""
    entries = [
        one
        for one in document["launches"]
        if one["kernel"] == "int8_product_kernel" and "'BLOCK_M': 16" in one["launch"]
    ]
    assert entries
    for one in entries:
        assert one["left_in_flight"] >= 8, one
        # two programs share a processor of 100 KB
        assert 2 * (one["shared_bytes"] + 1024) <= 100 * 1024, one


@pytest.mark.parametrize("kernel", ["attend_kernel", "int8_product_kernel"])
def test_keys_values_and_weights_are_read_ahead_16_bytes_at_a_time(
    document: dict[str, Any], kernel: str
) -> None:
    entries = [one for one in document["launches"] if one["kernel"] == kernel]
    assert entries
    for one in entries:
        assert one["wide_copies"] > 0, one
