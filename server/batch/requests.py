"""The requests of a batch: OpenAI's batch lines, or one line for each picture of a folder.

Owns the form of a line and its checks. Reads a file twice, so that no file has to fit in memory:
`check` once before the start, `read` while the batch runs. Knows nothing of how lines are sent.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
}


class BatchError(Exception):
    """The batch cannot be run; the message is one line for the user."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line. error: why it cannot be sent; then the rest may be missing."""

    custom_id: str
    url: str
    body: dict[str, Any]
    error: str | None = None


class BatchRequests(Protocol):
    """Where the requests come from."""

    def check(self) -> int:
        """How many requests there are. Raises BatchError."""

    def read(self) -> Iterator[BatchRequest]:
        """The requests in their order."""


class _Line(msgspec.Struct):
    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class RequestFile:
    """A file of OpenAI's batch lines: custom_id, method, url and body."""

    file: Path

    def check(self) -> int:
        """How many requests there are. Raises BatchError where two have the same custom_id."""
        first: dict[str, int] = {}
        number = 0
        for number, request in enumerate(self.read(), 1):
            if request.custom_id in first:
                raise BatchError(
                    f"request {number} of {self.file} has the custom_id {request.custom_id!r} of"
                    f" request {first[request.custom_id]}: the results would be ambiguous"
                )
            first[request.custom_id] = number
        if not number:
            raise BatchError(f"{self.file} has no requests")
        return number

    def read(self) -> Iterator[BatchRequest]:
        """The requests in their order; blank lines are skipped. Raises BatchError."""
        try:
            with self.file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _parse(line, number)
        except OSError as error:
            raise BatchError(f"{self.file} cannot be read: {error.strerror}") from error


def _parse(line: bytes, number: int) -> BatchRequest:
    try:
        parsed = msgspec.json.decode(line, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return BatchRequest(_custom_id(line, number), "", {}, f"line {number} is invalid: {error}")
    return BatchRequest(parsed.custom_id, parsed.url, parsed.body, _problem(parsed))


def _custom_id(line: bytes, number: int) -> str:
    """The custom_id of a line that is otherwise invalid, or one made from its number."""
    try:
        found = msgspec.json.decode(line, type=dict[str, Any]).get("custom_id")
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = None
    return found if isinstance(found, str) else f"line-{number}"


def _problem(line: _Line) -> str | None:
    if line.method != "POST":
        return f"method is {line.method!r}: only POST can be sent"
    if line.url not in URLS:
        return f"url is {line.url!r}: use one of {', '.join(URLS)}"
    if line.body.get("stream"):
        return "body.stream is true: results are whole answers, leave it out"
    return None


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """One chat request for each picture below a folder. fields: further fields of each body.

    custom_id is the picture's path below the folder.
    """

    folder: Path
    prompt: str
    fields: dict[str, Any]

    def check(self) -> int:
        """How many pictures there are. Raises BatchError where there is none."""
        if not self.folder.is_dir():
            raise BatchError(f"{self.folder} is not a folder")
        number = len(self._files())
        if not number:
            raise BatchError(f"{self.folder} has no pictures ({', '.join(MEDIA_TYPES)})")
        return number

    def read(self) -> Iterator[BatchRequest]:
        """The requests by path; a picture is read when its turn comes."""
        for file in self._files():
            custom_id = str(file.relative_to(self.folder))
            try:
                yield BatchRequest(custom_id, URLS[0], self._body(file))
            except OSError as error:
                reason = f"the picture cannot be read: {error.strerror}"
                yield BatchRequest(custom_id, URLS[0], {}, reason)

    def _files(self) -> list[Path]:
        found = (file for file in self.folder.rglob("*") if file.suffix.lower() in MEDIA_TYPES)
        return sorted(file for file in found if file.is_file())

    def _body(self, file: Path) -> dict[str, Any]:
        data = base64.b64encode(file.read_bytes()).decode()
        url = f"data:{MEDIA_TYPES[file.suffix.lower()]};base64,{data}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.prompt},
        ]
        return {"messages": [{"role": "user", "content": content}], **self.fields}
