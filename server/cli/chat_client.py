"""Requests of `vlmserve chat` to a server: the models' names, and answers as streams.

Owns HTTP and its errors. Knows nothing of commands or terminals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

CONNECT_TIMEOUT_S = 10.0


class ChatError(Exception):
    """What went wrong, for the user."""


class ChatClient:
    """One connection to a server. url: with or without /v1."""

    def __init__(self, url: str, key: str | None) -> None:
        # Here, so that the other commands start without an HTTP client.
        import httpx2

        self._errors = (httpx2.HTTPError, httpx2.InvalidURL)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base = url.rstrip("/").removesuffix("/v1")
        self._base = base
        # An answer may take long; what may not is to reach the server.
        timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)
        self._http = httpx2.Client(base_url=base, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def first_model(self) -> str:
        """The first name that the server serves. Raises ChatError."""
        try:
            response = self._http.get("/v1/models")
        except self._errors as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise ChatError(_message(response.content, response.status_code))
        names = [model["id"] for model in response.json()["data"]]
        if not names:
            raise ChatError(f"{self._base} serves no model")
        return str(names[0])

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """The pieces of one answer's text. Raises ChatError, also if the answer breaks off."""
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json=body | {"stream": True}
            ) as response:
                if response.status_code != 200:
                    raise ChatError(_message(response.read(), response.status_code))
                yield from _texts(response.iter_lines())
        except self._errors as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ChatError:
        return ChatError(f"{self._base} cannot be reached: {error}")


def _texts(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ChatError(str(chunk["error"].get("message", "the server failed")))
        for choice in chunk["choices"]:
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]
    raise ChatError("the connection was lost: the answer is incomplete")


def _message(content: bytes, status: int) -> str:
    """The error of an answer in this server's JSON, else its status."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"
