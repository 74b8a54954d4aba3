"""docs/api.md: every example is run as it stands, and answers what the page says."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlmserve.server.api import openapi
from vlmserve.server.http.page_files import DOCS_PATHS, UI_PATHS
from vlmserve.server.worker.app import ROUTES

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/api.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Files of the pages, which no client requests by hand.
PARTS_OF_PAGES = (DOCS_PATHS | UI_PATHS) - {"/docs", "/"}
DEADLINE_S = 120.0
# The end of an id, or a hash.
RANDOM = re.compile(r"[0-9a-f]{24,64}$")
# Of one model's figures, computed in another order of sums.
TOLERANCE = 1e-3


@dataclass
class Example:
    """code: to be run by `kind`, sh or python. The answer is of the kind json, sse and so on."""

    kind: str
    code: str
    answer_kind: str
    answer: str


def examples() -> list[Example]:
    """A block of code, then a block of what it prints."""
    blocks = BLOCK.findall(PAGE)
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    return [Example(*code, *answer) for code, answer in pairs]


def run(example: Example, url: str) -> str:
    code = example.code.replace(ADDRESS, url)
    if example.kind == "sh":
        command = ["bash", "-c", code.replace("curl ", "curl --silent --show-error ")]
    else:
        command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        # python3 in a shell: no site of the machine's, no proxy on the way.
        env={**os.environ, "no_proxy": "*"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(said, told, place="answer"):
    """The same keys in the same order, the same types, the same values but for what is new."""
    assert type(said) is type(told), place
    if isinstance(told, dict):
        said.pop("prompt_tokens_details", None)
        assert list(said) == list(told), place
        for key in told:
            check(said[key], told[key], f"{place}.{key}")
    elif isinstance(told, list):
        assert len(said) == len(told), place
        for index, (one, other) in enumerate(zip(said, told, strict=True)):
            check(one, other, f"{place}[{index}]")
    elif isinstance(told, float):
        assert math.isclose(said, told, abs_tol=TOLERANCE), place
    elif isinstance(told, str) and RANDOM.search(told):
        assert RANDOM.sub("", said) == RANDOM.sub("", told), place
        assert len(said) == len(told), place
    elif place.endswith(".created"):
        assert said > 0, place
    else:
        assert said == told, place


def check_stream(said: str, told: str):
    """Frame by frame; pieces of text are joined, as a slow client gets several in one."""
    check(joined(said), joined(told))


def joined(stream: str) -> list:
    frames: list = []
    for line in filter(None, stream.splitlines()):
        data = line.removeprefix("data: ")
        frame = data if data == "[DONE]" else json.loads(data)
        if frames and has_text(frame) and has_text(frames[-1]):
            texts = holder_of_text(frames[-1]), holder_of_text(frame)
            key = "content" if "content" in texts[0] else "text"
            texts[0][key] += texts[1][key]
        else:
            frames.append(frame)
    return frames


def holder_of_text(frame) -> dict:
    """The object of a frame that holds the piece of text."""
    if "event" in frame:
        return frame["event"]["delta"]
    choice = frame["choices"][0] if frame["choices"] else {}
    return choice.get("delta", choice)


def has_text(frame) -> bool:
    holder = {} if isinstance(frame, str) else holder_of_text(frame)
    return bool(holder.get("content") or holder.get("text"))


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize(
    "example", examples(), ids=[f"{i}-{one.kind}" for i, one in enumerate(examples())]
)
def test_an_example_answers_what_the_page_says(server, example):
    said = run(example, server.url)
    if example.answer_kind == "json":
        check(json.loads(said), json.loads(example.answer))
    elif example.answer_kind == "sse":
        check_stream(said, example.answer)
    elif example.answer_kind == "prometheus":
        assert set(example.answer.splitlines()) <= set(said.splitlines())
    else:
        assert example.answer_kind == "text"
        assert said.strip() == example.answer.strip()


def test_every_route_has_an_example():
    codes = "\n".join(one.code for one in examples())
    for endpoint in (one for group in ROUTES for one in group.endpoints):
        is_prefixed = endpoint.path.startswith(
            ("/ls/", "/experimental/", "/v1/openai/", "/alpha/models/")
        )
        if is_prefixed or endpoint.path in PARTS_OF_PAGES:
            continue
        path = re.sub(r"<\w+(:\w+)?>", "[^ ]+", endpoint.path)
        assert re.search(rf"{ADDRESS}{path}(\s|\?|$)", codes), (
            f"{endpoint.path} has no example in docs/api.md: add one, and what it answers"
        )


def test_every_status_of_the_document_stands_on_the_page_of_errors():
    errors = (ROOT / "docs/errors.md").read_text("utf-8")
    for status in openapi.REFUSALS:
        assert f"| {status} |" in errors
