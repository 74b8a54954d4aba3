"""schemathesis against the whole HTTP side: what the document says is what the server does."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from support.fuzzed_server import KEY, fuzzed_server

TESTS = Path(__file__).resolve().parents[2]
# They only end a run that hangs, however busy the machine is.
DEADLINE_S = 1800.0
LONG_DEADLINE_S = 7200.0
# Nothing that a checkout or a home happens to hold.
NO_CONFIG = Path(os.devnull)
# Whatever it sends, only these may come: its own check of valid data knows no rule told in words.
CHECKS = ("--checks", "all", "--exclude-checks", "positive_data_acceptance")
# The same handlers as without the prefix.
PREFIXED = ("--exclude-path-regex", "^/(ls|experimental|v1/openai)/")


def fuzz(
    *options: str,
    seed: str = "1",
    deadline_s: float = DEADLINE_S,
    config: Path = NO_CONFIG,
    **settings,
) -> str:
    """What schemathesis says of a server with these settings, its exit code last."""

    async def run() -> str:
        async with asyncio.timeout(deadline_s), fuzzed_server(**settings) as url:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
                *("run", f"{url}/openapi.json"),
                *("--url", url, "--seed", seed, "--no-color", "--continue-on-failure"),
                *("--generation-database", "none"),
                # However busy the machine is.
                *("--suppress-health-check", "all", "--request-timeout", "120"),
                *CHECKS,
                *options,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={
                    **os.environ,
                    "NO_PROXY": "*",
                    "PYTHONPATH": str(TESTS),
                    "SCHEMATHESIS_HOOKS": "support.openapi_hooks",
                },
            )
            try:
                output = (await process.communicate())[0].decode()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            return f"{output}\nexit code {process.returncode}"

    return asyncio.run(run())


@pytest.mark.slow
def test_a_seeded_sample_of_requests_is_answered_as_the_document_says():
    said = fuzz("--max-examples", "4", *PREFIXED)
    assert said.endswith("exit code 0"), said[-20_000:]
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in said


@pytest.mark.slow
def test_a_seeded_sample_of_the_page_rendering_and_moderation_is_answered_as_documented():
    paths = ("/v1/live", "/v1/playground", "/v1/chat/completions/render", "/v1/completions/render")
    options = [part for path in (*paths, "/v1/moderations") for part in ("--include-path", path)]
    options += ["--max-examples", "8", "--phases", "examples,coverage,fuzzing"]
    said = fuzz(*options, seed="2", task="moderation")
    assert said.endswith("exit code 0"), said[-20_000:]
    assert "Operations:       7 selected" in said


@pytest.mark.slow
def test_a_server_with_keys_asks_for_them_wherever_its_document_says_so():
    options = ("--max-examples", "2", "--phases", "examples,fuzzing", *PREFIXED)
    said = fuzz("-H", f"Authorization: Bearer {KEY}", *options, api_keys=[KEY])
    assert said.endswith("exit code 0"), said[-20_000:]


@pytest.mark.slow
def test_a_server_that_refuses_unknown_fields_says_so_in_its_document():
    options = ("--max-examples", "2", "--phases", "coverage", "--include-path", "/tokenize")
    said = fuzz(*options, unknown_fields="refuse")
    assert said.endswith("exit code 0"), said[-20_000:]


@pytest.mark.slow
def test_a_server_that_is_not_ready_answers_503_and_nothing_worse(tmp_path):
    config = tmp_path / "schemathesis.toml"
    config.write_text(
        '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 503]\n'
    )
    options = ("--max-examples", "2", "--phases", "examples,fuzzing", *PREFIXED)
    said = fuzz(*options, config=config, is_ready=False)
    assert said.endswith("exit code 0"), said[-20_000:]
    said = fuzz(*options, is_ready=False)
    assert "[503] Service Unavailable" in said
    assert said.endswith("exit code 1")


@pytest.mark.fuzz
def test_many_requests_are_answered_as_the_document_says():
    examples, seed = os.environ.get("EXAMPLES") or "300", os.environ.get("SEED") or "1"
    said = fuzz("--max-examples", examples, seed=seed, deadline_s=LONG_DEADLINE_S)
    print(said)
    assert said.endswith("exit code 0"), said[-20_000:]
