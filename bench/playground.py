"""Measures the page at / in Debian's Chromium, and draws its pictures for the documentation.

    python bench/playground.py                            # first paint, frames of long answers
    python bench/playground.py --pictures docs/playground

First paint: of the bundled model's server while it is idle, the best and the median of ten loads
in fresh profiles. Frames: while 10,000 tokens with log-probabilities are streamed as fast as a
scripted engine gives them, for each kind of Markdown; Chromium reports each frame over 50 ms. Three
times: from the server, from a replay of what it sent (`page_replay.py`), and replayed while
Chromium traces the processor time that the page takes between two frames, which other load does
not change. The last line is one JSON document. Needs playwright and Chromium.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.browsers import chromium, opened  # noqa: E402
from support.http_side import MODEL, meta_like_tokenizer, write_checkpoint  # noqa: E402
from support.running import serving  # noqa: E402
from support.threaded import server_in_thread  # noqa: E402

from page_replay import record, replaying  # noqa: E402
from processes import arguments  # noqa: E402
from vlmserve.models.batch import TokenLogprobs  # noqa: E402
from vlmserve.router.messages import SequenceOutput  # noqa: E402

NUM_LOADS = 10
NUM_TOKENS = 10_000
DESKTOP = {"width": 1360, "height": 850}
PHONE = {"width": 390, "height": 780}
WATCH_FRAMES = """() => {
  window.longFrames = [];
  new PerformanceObserver((list) => {
    window.longFrames.push(...list.getEntries().map((entry) => entry.duration));
  }).observe({ type: "long-animation-frame" });
}"""
# What an answer repeats, by the question.
KINDS = {
    "paragraphs": "What is in this image? You are a *helpful* assistant.\n\n",
    "one paragraph": "What is in this image? You are a *helpful* assistant. ",
    "list": "- What is in this `image`?\n  - You are a helpful assistant.\n",
    "table": "| What | is in | this image |\n",
    "code": "What is in this image?\n",
}
STARTS = {"table": "| a | b | c |\n|---|---|---|\n", "code": "```\n"}


def first_paints(browser: Any, url: str) -> list[float]:
    """Milliseconds from the start of each load to its first paint."""
    times = []
    for _ in range(NUM_LOADS):
        with opened(browser, url) as page:
            page.wait_for_selector(".example")
            times.append(page.evaluate("performance.getEntriesByType('paint')[0].startTime"))
    return times


def long_answer(request: Any) -> Iterator[SequenceOutput]:
    """NUM_TOKENS tokens of the kind that is asked for, each with five alternatives."""
    tokenizer = meta_like_tokenizer()
    prompt = tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    kind = prompt.split("<|eot_id|>")[-2].rpartition("<|end_header_id|>")[2].strip()
    first, repeated = (
        tokenizer.encode(text, add_special_tokens=False).ids
        for text in (STARTS.get(kind, ""), KINDS[kind])
    )
    for number in range(NUM_TOKENS):
        at = number - len(first)
        token_id = first[number] if at < 0 else repeated[at % len(repeated)]
        others = [token_id, *[other for other in repeated if other != token_id][:4]]
        yield SequenceOutput(
            request_id="0",
            token_ids=[token_id],
            logprobs=[TokenLogprobs(-0.1, others, [-0.1, -2.0, -4.0, -5.0, -6.0])],
            finish_reason="length" if number == NUM_TOKENS - 1 else None,
        )


def wait_until_ready(page: Any) -> None:
    """Wait until the page has loaded everything and done what it does while idle."""
    page.wait_for_selector("#model:not([disabled])")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)


def ask_for(page: Any, kind: str) -> int:
    """Ask for an answer; the tokens on the page once it is complete."""
    page.evaluate(WATCH_FRAMES)
    page.fill("#question", kind)
    page.press("#question", "Enter")
    page.wait_for_selector(".answer.done")
    # Until the conversation is kept too.
    page.wait_for_timeout(1000)
    return int(page.inner_text(".machine").partition("Answer")[2].split()[0])


def long_frames(browser: Any, url: str, kind: str) -> dict[str, Any]:
    """Milliseconds of frames over 50 ms during the answer."""
    with opened(browser, url, viewport=DESKTOP) as page:
        wait_until_ready(page)
        assert ask_for(page, kind) == NUM_TOKENS
        frames = page.evaluate("longFrames")
    return {"frames_over_50_ms": len(frames), "longest_frame_ms": max(frames, default=0.0)}


def longest_work(browser: Any, url: str, kind: str) -> float:
    """Milliseconds of processor time that the page takes between two of its frames, at most."""
    with opened(browser, url, viewport=DESKTOP) as page:
        wait_until_ready(page)
        browser.start_tracing(page=page, categories=["toplevel", "cc"])
        ask_for(page, kind)
        events = json.loads(browser.stop_tracing())["traceEvents"]
    threads = [(event["pid"], event["tid"]) for event in events if is_main_thread(event)]
    longest = work = 0.0
    for event in sorted(events, key=lambda event: event.get("ts", 0) + event.get("dur", 0)):
        if (event["pid"], event["tid"]) not in threads or "tdur" not in event:
            continue
        if event["name"] == "ThreadControllerImpl::RunTask":
            work += event["tdur"]
            longest = max(longest, work)
        elif event["name"] == "ProxyMain::BeginMainFrame":
            longest = max(longest, work + event["tdur"])
            work = -event["tdur"]  # the task around it ends next
    return longest / 1000


def is_main_thread(event: dict[str, Any]) -> bool:
    """Whether the event names a page's main thread."""
    name = event.get("args", {}).get("name")
    return event.get("name") == "thread_name" and name == "CrRendererMain"


def frames_of(browser: Any, kind: str, port: int, folder: Path) -> dict[str, Any]:
    """Frames of one kind of answer, from the server at `port` and replayed."""
    url = "http://127.0.0.1:{}/"
    served = long_frames(browser, url.format(port), kind)
    body = {"model": MODEL, "messages": [{"role": "user", "content": kind}], "stream": True}
    body |= {"stream_options": {"include_usage": True}, "return_timings": True}
    body |= {"logprobs": True, "top_logprobs": 5}
    with replaying(record(port, body), folder) as replay_port:
        replayed = long_frames(browser, url.format(replay_port), kind)
        work_ms = longest_work(browser, url.format(replay_port), kind)
    return {"served": served, "replayed": replayed, "most_cpu_ms_between_frames": work_ms}


def draw(browser: Any, url: str, folder: Path) -> None:
    """Write the pictures: each colour scheme at each size."""
    folder.mkdir(parents=True, exist_ok=True)
    for device, size in (("desktop", DESKTOP), ("phone", PHONE)):
        for scheme in ("light", "dark"):
            with opened(browser, url, viewport=size, color_scheme=scheme) as page:
                page.click(".example >> nth=0")
                page.wait_for_selector(".answer.done")
                if device == "desktop":
                    page.click("text=Tokens")
                    page.click(".token >> nth=4")
                write_small(page.screenshot(), folder / f"{device}-{scheme}.png")


def write_small(picture: bytes, path: Path) -> None:
    """The picture with 256 colours, which a page of few colours does not miss."""
    path.write_bytes(picture)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    options = arguments(__doc__, pictures=("", "write the pictures into this folder"))
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder = Path(name)
        with serving(folder, "--dtype", "float32") as server:
            if options.pictures:
                draw(browser, f"{server.url}/", Path(options.pictures))
                return
            paints = first_paints(browser, f"{server.url}/")
        checkpoint = write_checkpoint(folder / "checkpoint")
        with server_in_thread(checkpoint, script=long_answer) as port:
            frames = {kind: frames_of(browser, kind, port, folder) for kind in KINDS}
    report = {
        "first_paint_ms": {"best": min(paints), "median": statistics.median(paints)},
        "tokens": NUM_TOKENS,
        "frames": frames,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
