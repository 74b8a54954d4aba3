"""`vlmserve bench serve`: against the real server, and against ones that misbehave."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vlmserve.server.bench.client import Client
from vlmserve.server.bench.settings import BenchError, Level, Load, Sweep
from vlmserve.server.bench.sweep import run_sweep
from vlmserve.server.cli.main import app

COMMAND = [sys.executable, "-m", "vlmserve.server", "bench", "serve"]
PNG = b"\x89PNG\r\n\x1a\n"
STREAM = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HEAD = "HTTP/1.1 {}\r\nContent-Type: application/json\r\nConnection: close\r\n"
PLAIN = HEAD + "Content-Length: {}\r\n\r\n{}"
PIECE = 'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
ENDING = 'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
DONE = "data: [DONE]\n\n"


def bench(*options, **env):
    return subprocess.run(
        [*COMMAND, *options],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "COLUMNS": "100", **env},
    )


def plain(body, status="200 OK"):
    return PLAIN.format(status, len(body), body)


class Stub:
    """A server that gives `answer(body)` to every chat request, and keeps what it got."""

    def __init__(self, answer, host="127.0.0.1"):
        self.answer, self.host = answer, host
        self.heads, self.bodies, self._tasks = [], [], []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"http://{host}:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *exc_info):
        self._server.close()
        async with asyncio.timeout(30):
            await asyncio.gather(*self._tasks)

    async def _serve(self, reader, writer):
        self._tasks.append(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        self.heads.append(head)
        self.bodies.append(body)
        said = self.answer(body) if "/chat/" in head else plain('{"data": [{"id": "only"}]}')
        if said is None:
            await reader.read()  # says nothing until the client goes
        else:
            writer.write(said.encode())
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def ask(answer, timeout_s=30.0):
    """The sample of one request to a stub."""

    async def run():
        async with Stub(answer) as stub, Client(stub.url, timeout_s=timeout_s) as client:
            return await client.chat(b"{}")

    return asyncio.run(run())


def test_a_sweep_by_concurrency_ends_in_one_json_document_a_table_and_a_plot(server, tmp_path):
    done = bench(
        *("--url", f"{server.url}/v1", "--concurrency", "1,3", "--requests", "3"),
        *("--output-tokens", "6", "--slo-ttft-ms", "60000", "--plot", str(tmp_path / "a.png")),
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    document = json.loads(line)
    assert document["model"] == "vlmserve-tiny-vision"
    assert document["load"]["ignore_eos"]
    assert [level["concurrency"] for level in document["levels"]] == [1, 3]
    for level in document["levels"]:
        assert (level["requests"], level["errors"]) == (3, 0)
        assert (level["output_tokens"], level["output_lengths"]) == (3 * 6, [6])
        assert level["is_equal_length"]
        assert level["is_counted_by_server"]
        assert level["prompt_tokens"] == 3 * 17
        assert 0 < level["ttft_p50_ms"] <= level["ttft_p99_ms"] <= level["end_to_end_p99_ms"]
        assert level["goodput_per_s"] == level["requests_per_s"] > 0
        assert level["client_cpu"] > 0
    assert {"processor", "cores"} <= set(document["client"])
    for text in ("3 at once", "TTFT", "goodput"):
        assert text in done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_a_sweep_by_rate_with_repeated_pictures_and_long_prompts(server):
    done = bench(
        *("--url", f"{server.url}/v1", "--request-rate", "40", "--requests", "6"),
        *("--output-tokens", "4", "--image-pool", "2", "--image-size", "64,90x48"),
        *("--images", "2", "--prompt-words", "30", "--warm-up", "0"),
    )
    assert done.returncode == 0, done.stderr
    (level,) = json.loads(done.stdout)["levels"]
    assert (level["concurrency"], level["request_rate"]) == (None, 40.0)
    assert (level["requests"], level["output_tokens"]) == (6, 24)
    assert level["prompt_tokens"] > 6 * 30
    assert level["send_lag_p99_ms"] >= 0
    assert level["goodput_per_s"] is None


def test_without_streaming_only_whole_answers_are_timed(server):
    done = bench(
        *("--url", f"{server.url}/v1", "--concurrency", "2", "--requests", "2", "--no-stream"),
        *("--output-tokens", "5", "--images", "0"),
    )
    (level,) = json.loads(done.stdout)["levels"]
    assert (level["requests"], level["output_lengths"]) == (2, [5])
    assert level["ttft_p50_ms"] is None
    assert level["end_to_end_p50_ms"] > 0


def test_a_whole_stream_is_a_success_however_its_bytes_are_cut():
    sample = ask(lambda body: STREAM + PIECE * 3 + ENDING + USAGE + DONE)
    assert sample.error is None
    assert (sample.prompt_tokens, sample.completion_tokens) == (7, 3)
    assert len(sample.chunk_times) == 3
    assert sample.due == sample.sent <= sample.chunk_times[0] <= sample.end


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_ipv6_url_is_sent_with_a_bracketed_host():
    """The Host field named the address without its brackets, which servers reject."""

    async def run():
        async with Stub(lambda body: STREAM + PIECE + ENDING + DONE, "::1") as stub:
            async with Client(stub.url, timeout_s=30.0) as client:
                names, sample = await client.model_names(), await client.chat(b"{}")
            return stub, names, sample

    stub, names, sample = asyncio.run(run())
    assert names == ["only"]
    assert sample.error is None
    host = stub.url.removeprefix("http://").removesuffix("/v1")
    assert all(head.count(f"Host: {host}\r\n") == 1 for head in stub.heads)
    assert host.startswith("[::1]:")


def test_without_usage_pieces_are_counted_and_it_shows():
    sample = ask(lambda body: STREAM + PIECE * 5 + DONE)
    assert (sample.error, sample.completion_tokens, sample.has_usage) == (None, 5, False)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (plain('{"error": {"message": "full"}}', "429 Too Many Requests"), "HTTP 429"),
        (plain("no"), "not JSON"),
        (plain('{"choices": []}'), "empty answer"),
        (STREAM + PIECE, "cut stream"),
        (STREAM + PIECE + 'data: {"error": {"message": "died"}}\n\n' + DONE, "error event"),
        (STREAM + DONE, "empty answer"),
        ("", "connection"),
        (PLAIN.format("200 OK", 1000, "{"), "connection"),
        (None, "timeout"),
    ],
)
def test_every_failure_has_its_kind(answer, kind):
    sample = ask(lambda body: answer, timeout_s=1.0 if answer is None else 30.0)
    assert sample.error == kind
    assert sample.detail
    assert sample.end >= sample.sent


def sweep_of(url, **more):
    load = Load(0, max_tokens=3, num_images=0)
    return Sweep(
        url=url, levels=[Level(concurrency=1)], load=load, num_requests=2, num_warm_up=1, **more
    )


class Nobody:
    """Watches nothing."""

    def start(self, level, num_requests):
        pass

    def take(self, sample):
        pass

    def finish(self, summary):
        pass


@pytest.mark.parametrize("is_taken", [True, False])
def test_ignore_eos_is_sent_only_to_servers_that_take_it(is_taken):
    def answer(body):
        if b"ignore_eos" in body and not is_taken:
            return plain('{"error": {"message": "unknown field"}}', "400 Bad Request")
        return STREAM + PIECE * 3 + ENDING + USAGE + DONE

    async def run():
        async with Stub(answer) as stub:
            return stub, await run_sweep(sweep_of(stub.url), Nobody())

    stub, result = asyncio.run(run())
    assert result.is_eos_ignored is is_taken
    assert result.summaries[0].errors == 0
    # behind the model's name and the probe: one of the warm-up, two of the level
    assert [b"ignore_eos" in body for body in stub.bodies[2:]] == [is_taken] * 3


def test_the_api_key_comes_from_the_environment_and_is_in_no_output():
    async def run():
        async with Stub(lambda body: STREAM + PIECE + ENDING + DONE) as stub:
            options = ("--url", stub.url, "--api-key-env", "MY_KEY", "--images", "0")
            return stub, await asyncio.to_thread(
                bench, *options, "--concurrency", "1", "--requests", "2", MY_KEY="sk-secret"
            )

    stub, done = asyncio.run(run())
    assert done.returncode == 0, done.stderr
    assert all("Authorization: Bearer sk-secret" in head for head in stub.heads)
    assert "sk-secret" not in done.stdout + done.stderr
    assert "no usage" in done.stderr


def test_a_load_that_fails_throughout_exits_with_one_line():
    async def run():
        async with Stub(lambda body: plain("{}", "503 Service Unavailable")) as stub:
            await run_sweep(sweep_of(stub.url), Nobody())

    with pytest.raises(BenchError, match=r"every request of the warm-up failed: HTTP 503"):
        asyncio.run(run())


def test_a_server_that_is_not_there_is_one_clear_line():
    done = bench("--url", "http://127.0.0.1:9/v1", "--concurrency", "1")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("vlmserve: no answer from http://127.0.0.1:9/v1/models")


@pytest.mark.parametrize(
    "options",
    [
        ("--concurrency", "0"),
        ("--concurrency", "1.5"),
        ("--concurrency", "1", "--request-rate", "1"),
        ("--request-rate", "fast"),
        ("--image-size", "12x"),
        ("--image-size", "4"),
        ("--output-tokens", "0"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_sent(options):
    done = CliRunner().invoke(app, ["bench", "serve", *options], env={"COLUMNS": "100"})
    assert done.exit_code == 2
    assert options[-2].lstrip("-") in done.stderr or options[-1] in done.stderr


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "ftp://a/v1", "http://user:pw@a/v1", "http://[::1"]
)
def test_a_url_that_is_no_base_url_is_refused(url):
    done = CliRunner().invoke(app, ["bench", "serve", "--url", url])
    assert done.exit_code == 1
    assert done.stderr.startswith("vlmserve: ")
    assert "pw@" not in done.stderr
