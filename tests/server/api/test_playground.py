"""The page at /: its files, its headers, what it asks the server for, its parts without a browser.

The whole page in a browser: tests/whole/test_playground.py.
"""

import asyncio
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.http_side import (
    MODEL,
    ScriptedEngine,
    client_of,
    error_of,
    meta_like_tokenizer,
    running_server,
    tokens_one_by_one,
)

from vlmserve.models.bundled import CHECKPOINT
from vlmserve.router.messages import EngineStats
from vlmserve.server.http.page_files import UI_FILES, UI_PATHS
from vlmserve.server.images.tiling import TilingConfig, choose_grid, fit_to_grid
from vlmserve.server.settings import ServerSettings
from vlmserve.server.telemetry.live import MAX_WATCHERS

ROOT = Path(__file__).resolve().parents[3]
UI = ROOT / "server/api/pages/ui"
NODE_TESTS = ROOT / "tests/server/api/playground"
MAX_BYTES = 250_000
# What would make HTML or code of a text.
DANGEROUS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
)
TOKENIZER = meta_like_tokenizer()
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs node")


def with_client(checkpoint, use, script=lambda request: [], **settings):
    async def run():
        engine = ScriptedEngine(script)
        async with client_of(checkpoint, engine, **settings) as client:
            return await use(client, engine)

    return asyncio.run(run())


def get(checkpoint, path, headers=None, **settings):
    return with_client(checkpoint, lambda client, _: client.get(path, headers=headers), **settings)


def files_of_folder():
    return {path.relative_to(UI).as_posix() for path in UI.rglob("*") if path.is_file()}


def test_every_file_of_the_folder_is_served_and_all_are_small():
    assert files_of_folder() == UI_FILES.keys() | {"index.html"}
    assert sum((UI / name).stat().st_size for name in files_of_folder()) < MAX_BYTES


def test_the_vendored_libraries_are_the_files_of_the_list():
    listed = (UI / "vendor/libraries.txt").read_text()
    names = re.findall(r"(?m)^(\S+\.js)$", listed)
    assert 0 < len(names) <= 3
    assert {f"vendor/{name}" for name in names} == {
        name for name in UI_FILES if name.startswith("vendor/") and name.endswith(".js")
    }
    sums = [hashlib.sha256((UI / "vendor" / name).read_bytes()).hexdigest() for name in names]
    assert re.findall(r"sha256: (\w+)", listed) == sums


def test_row_76_the_page_has_nothing_inline_and_names_no_other_host():
    page = (UI / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bon\w+=|style=", page)
    for name in files_of_folder():
        if name.startswith("vendor/") or name.endswith(".png"):
            continue
        text = (UI / name).read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), name
        assert not DANGEROUS.search(text), name
    referenced = set(re.findall(r'(?:src|href)="ui/([^"]+)"', page))
    assert referenced <= UI_FILES.keys()


def test_each_module_imports_files_that_are_served():
    for name in UI_FILES:
        if name.endswith(".js") and not name.startswith("vendor/"):
            imports = re.findall(r'from "\./([^"]+)"', (UI / name).read_text())
            assert set(imports) <= UI_FILES.keys(), name


def test_row_76_the_policy_of_the_page_allows_only_its_own_files(checkpoint):
    response = get(checkpoint, "/", {"Accept": "text/html,*/*;q=0.8"})
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["form-action"] == policy["trusted-types"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_client_of_the_api_gets_json_at_the_root_and_a_browser_the_page(checkpoint):
    rejected = error_of(get(checkpoint, "/", {"Accept": "application/json"}), 404)
    assert "/docs" in rejected["message"]
    assert get(checkpoint, "/", {"Accept": "*/*"}).status_code == 200
    assert get(checkpoint, "/", {"Accept": "application/json, text/plain, */*"}).status_code == 200


def test_row_76_without_the_page_none_of_its_routes_exists(checkpoint):
    async def use(client, _):
        paths = [*sorted(UI_PATHS), "/v1/playground", "/v1/live"]
        statuses = [(await client.get(path)).status_code for path in paths]
        return statuses, (await client.get("/openapi.json")).json()["paths"]

    statuses, documented = with_client(checkpoint, use, ui=False)
    assert set(statuses) == {404}
    assert not {path for path in documented if path in UI_PATHS or path == "/v1/live"}
    assert "/docs" in documented


@pytest.mark.parametrize("path", ["/v1/playground", "/v1/live"])
def test_what_the_page_asks_for_needs_the_key(checkpoint, path):
    assert get(checkpoint, path, api_keys=["k"]).status_code == 401


def test_the_page_learns_the_limits_of_the_server(checkpoint):
    info = get(checkpoint, "/v1/playground").json()
    assert (info["tile_size"], info["max_image_tiles"]) == (56, 4)
    assert (info["is_bundled_model"], info["max_images"]) == (False, 16)
    settings = ServerSettings(model=str(CHECKPOINT), engine_socket="", served_model_names=["m"])

    async def bundled():
        async with running_server(settings, engine_client=ScriptedEngine(lambda r: [])) as url:
            import httpx2

            async with httpx2.AsyncClient(base_url=url) as client:
                return (await client.get("/v1/playground")).json()["is_bundled_model"]

    assert asyncio.run(bundled())


async def first_frame(client):
    async with client.stream("GET", "/v1/live") as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                return json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without a frame")


def test_the_live_counts_are_those_of_the_engine_and_of_the_worker(checkpoint):
    async def use(client, engine):
        engine.stats = EngineStats(
            num_running=2, num_steps=7, text_blocks_used=1, text_blocks_cached=2,
            text_blocks_total=9, num_preemptions=3, image_cache_hits=4, image_cache_misses=5,
            prefix_tokens_queried=8, prefix_tokens_hit=6,
        )  # fmt: skip
        before = await first_frame(client)
        turn = {"role": "user", "content": "What"}
        await client.post("/v1/chat/completions", json={"model": MODEL, "messages": [turn]})
        # Counts are shared between readers for half a second.
        while (after := await first_frame(client))["time_s"] == before["time_s"]:
            pass
        return before, after

    script = lambda request: tokens_one_by_one(TOKENIZER, "What is")  # noqa: E731
    before, after = with_client(checkpoint, use, script)
    assert before["text_blocks"] == {"used": 1, "cached": 2, "total": 9}
    assert (before["running"], before["steps"], before["preemptions"]) == (2, 7, 3)
    caches = {"image_cache_hits": 4, "image_cache_misses": 5}
    caches |= {"prefix_tokens_queried": 8, "prefix_tokens_hit": 6}
    (replica,) = before["replicas"]
    assert (replica["running"], replica["preemptions"], replica["restarts"]) == (2, 3, 0)
    assert before.items() >= caches.items() <= replica.items()
    assert after["generated_tokens"] - before["generated_tokens"] == 3
    assert after["prompt_tokens"] > before["prompt_tokens"]


def test_too_many_readers_of_the_live_counts_are_refused_and_places_are_given_back(checkpoint):
    async def use(client, _):
        async with asyncio.TaskGroup() as group:
            leave = asyncio.Event()
            entered = asyncio.Semaphore(0)

            async def watch():
                async with client.stream("GET", "/v1/live") as response:
                    lines = response.aiter_lines()
                    await anext(lines)
                    entered.release()
                    await leave.wait()

            for _ in range(MAX_WATCHERS):
                group.create_task(watch())
            for _ in range(MAX_WATCHERS):
                await entered.acquire()
            refused = await client.get("/v1/live")
            leave.set()
        for _ in range(600):
            async with client.stream("GET", "/v1/live") as response:
                if response.status_code == 200:
                    return refused
            await asyncio.sleep(0.1)
        raise AssertionError("the places were not given back")

    error = error_of(with_client(checkpoint, use), 429)
    assert "watch this worker" in error["message"]


@needs_node
def test_the_parts_of_the_page_do_what_their_own_tests_expect():
    files = sorted(map(str, NODE_TESTS.glob("*.test.mjs")))
    done = subprocess.run(
        ["node", "--test", *files], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:]


@needs_node
def test_the_grid_that_the_page_draws_is_the_servers_for_two_hundred_sizes():
    drawn = random.Random(18)
    sizes = [(drawn.randint(1, 3000), drawn.randint(1, 3000)) for _ in range(170)]
    sizes += [
        (size, other) for size in (1, 223, 224, 225, 448, 561) for other in (1, 224, 449, 560, 1121)
    ]
    assert len(sizes) == 200
    cases = [
        (height, width, tiles, tile)
        for height, width in sizes
        for tiles, tile in ((4, 560), (4, 224), (4, 56), (6, 448), (1, 560))
    ]
    code = (
        f"import {{ tilesOf }} from {json.dumps((UI / 'tiling.js').as_uri())};\n"
        f"const cases = {json.dumps(cases)};\n"
        "const seen = cases.map((c) => tilesOf(...c));\n"
        "const flat = seen.map((s) => [s.rows, s.columns, s.inner.height, s.inner.width]);\n"
        "console.log(JSON.stringify(flat));"
    )
    done = subprocess.run(
        ["node", "--input-type=module"], input=code, capture_output=True, text=True, check=True
    )
    expected = []
    for height, width, tiles, tile in cases:
        grid = choose_grid(height, width, TilingConfig(tile, tiles).tile_limit(None), tile)
        size = fit_to_grid(height, width, grid, tile)
        expected.append([grid.rows, grid.columns, size.height, size.width])
    assert json.loads(done.stdout) == expected


PROGRAMS = {
    "curl": ["bash"],
    "python": [sys.executable, "-"],
    "javascript": ["node", "--input-type=module"],
}


@needs_node
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("language", PROGRAMS)
def test_a_copied_program_runs_as_it_stands(checkpoint, language):
    """With quotes of every language in the question, a long picture, and a key."""
    question = 'What\'s "in" it?\n\'\'\'\n"""\nREQUEST\n$HOME `a` ${b} \\n \\'
    # Over the 128 KiB that one argument of a command may have.
    url = "data:image/png;base64," + "A" * 200_000
    turn = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]

    async def run():
        engine = ScriptedEngine(lambda request: tokens_one_by_one(TOKENIZER, "What is"))
        async with client_of(checkpoint, engine, api_keys=["k'$1"]) as client:
            body = {"model": MODEL, "messages": [{"role": "user", "content": turn}]}
            address = f"{str(client.base_url).rstrip('/')}/v1/chat/completions"
            outputs = []
            for key in ("k'$1", None):
                program = await made_program(language, {"url": address, "body": body, "key": key})
                outputs.append(await output_of(PROGRAMS[language], program, "k'$1"))
            return outputs, engine.requests

    outputs, requests = asyncio.run(run())
    assert all("What is" in output for output in outputs)
    prompts = {TOKENIZER.decode(request.prompt_token_ids) for request in requests}
    assert len(prompts) == 1
    assert question in prompts.pop()


async def made_program(language, request):
    module = json.dumps((UI / "snippets.js").as_uri())
    code = (
        f"import {{ LANGUAGES }} from {module};\n"
        f"process.stdout.write(LANGUAGES.{language}.make({json.dumps(request)}));"
    )
    return await output_of(["node", "--input-type=module"], code)


async def output_of(command, text, key=""):
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "VLMSERVE_API_KEY": key, "no_proxy": "*"},
    )  # fmt: skip
    output, errors = await process.communicate(text.encode())
    assert process.returncode == 0, errors.decode()
    return output.decode()
