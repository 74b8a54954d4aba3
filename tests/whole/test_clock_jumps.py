"""The wall clock jumps a day forward and back while requests run: nothing fails or expires.

A small library shifts the wall clock alone, as a real jump does. libfaketime changes sleeps too.
"""

from __future__ import annotations

import ast
import json
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.invariants import CHAT, PICTURE, Standing, body_for
from support.running import FAULTY_SERVER, running_command

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "support" / "clock_shift.c"
DAY_S = 24 * 60 * 60
# Where the date itself is wanted: in answers, logs and prompts, and when a stored response expires.
WALL_CLOCK_READERS = {
    "server/adapters/updates.py",
    "server/api/response_store.py",
    "server/api/services.py",
    "server/worker/app.py",
    "server/bench/report.py",
    "server/bench/runner.py",
    "server/cli/adapter_sources.py",
    "server/prompts/chat_template.py",
    "server/prompts/templates/child.py",
    "server/prompts/templates/environment.py",
    "server/prompts/processor.py",
    "server/schemas/openai/answer_frames.py",
    "server/schemas/openai/response_answers.py",
    "server/telemetry/request_record.py",
    "server/telemetry/vllm_names.py",
}
WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.datetime.now", "datetime.datetime.utcnow"}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """The shift of the wall clock, compiled."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    built = tmp_path / "clock_shift.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(built), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True)
    return built


@pytest.mark.slow
def test_row_73_a_jump_of_the_wall_clock_fails_no_request(
    library, unused_port, tmp_path, wait_for
) -> None:
    shift, fault = tmp_path / "shift", tmp_path / "fault"
    shift.write_bytes(bytes(8))
    variables = {"LD_PRELOAD": str(library), "SHIFT_FILE": str(shift), "FAULT_FILE": str(fault)}
    command = [sys.executable, str(FAULTY_SERVER), json.dumps({"port": unused_port})]
    with running_command(command, unused_port, tmp_path, **variables) as server:
        standing = Standing(server, is_warm=True)

        def ask(**more: object) -> int:
            answer = standing.post(CHAT, body_for(CHAT, **more))
            assert answer.status == 200, answer.body
            return answer.json["created"]

        def jump_to(days: int) -> None:
            with shift.open("r+b") as file:
                file.write(struct.pack("=q", days * DAY_S))

        with standing.holds(), ThreadPoolExecutor(4) as pool:
            start = ask(images=[PICTURE])
            fault.write_text("slow 0.02")
            body = body_for(CHAT, max_tokens=100, ignore_eos=True, stream=True)
            streams = [pool.submit(standing.post, CHAT, body) for _ in range(4)]
            assert wait_for(lambda: standing.metrics()["generation_tokens_total"] > 8)
            for days in (1, -1, 0):
                jump_to(days)
                assert abs(ask() - start - days * DAY_S) < DAY_S / 2, "the clock did not jump"
                assert standing.get("/v1/health/ready").status == 200
            for stream in streams:
                assert stream.result().status == 200
                assert stream.result().frames[-1] == "[DONE]"
            fault.write_text("")
        restarts = [value for name, value in standing.metrics().items() if "restarts" in name]
        assert restarts
        assert not any(restarts)


def test_row_73_only_what_wants_the_date_reads_the_wall_clock() -> None:
    """Deadlines, limits and pauses read the monotonic clock."""
    found = set()
    for path in (path for floor in ("server", "router") for path in (ROOT / floor).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        if WALL_CLOCKS & {ast.unparse(one) for one in nodes if isinstance(one, ast.Attribute)}:
            found.add(str(path.relative_to(ROOT)))
    assert "server/api/response_store.py" in found
    assert found <= WALL_CLOCK_READERS
