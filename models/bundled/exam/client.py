"""Puts an exam to a running OpenAI-compatible server over HTTP, with the standard library alone.

Knows nothing of models: any server of this API can be asked.
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .exam import Item, Result


class ClientError(Exception):
    """The server could not be reached or answered with an error; the message says which."""


@dataclass(frozen=True, slots=True)
class Client:
    """A server's API. url: with its version, as in http://127.0.0.1:8000/v1; temperature: sent
    with each request, or None to send no sampling field at all."""

    url: str
    temperature: float | None = 0.0
    model: str | None = None
    api_key: str | None = None
    timeout_s: float = 120.0

    def put(self, items: list[Item], concurrency: int = 8) -> list[Result]:
        """A result for each item, in order, `concurrency` requests at a time."""
        model = self.model or self.first_model()
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda item: self._put(item, model), items))

    def first_model(self) -> str:
        """The first model that the server names."""
        return str(self._request("/models", None)["data"][0]["id"])

    def _put(self, item: Item, model: str) -> Result:
        body: dict[str, Any] = {"model": model, "messages": messages_of(item)}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        reply = self._request("/chat/completions", body)
        answer = reply["choices"][0]["message"]["content"] or ""
        return Result(item, is_right=answer.strip() == item.answer, answer=answer)

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                reply: dict[str, Any] = json.load(response)
                return reply
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ClientError(f"{path}: status {error.code}: {text[:500]}") from error
        except OSError as error:
            raise ClientError(f"{self.url} cannot be reached: {error}") from error


def messages_of(item: Item) -> list[dict[str, Any]]:
    """The item as the messages of a chat request."""
    messages: list[dict[str, Any]] = []
    if item.system:
        messages.append({"role": "system", "content": item.system})
    for text, answer in item.turns:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    messages.pop()  # the last answer is the server's to give
    if item.picture is not None:
        first = messages[1 if item.system else 0]
        first["content"] = _parts(item, first["content"])
    return messages


def _parts(item: Item, text: str) -> list[dict[str, Any]]:
    """The item's picture and a text, in the item's order."""
    body = base64.b64encode(item.picture_bytes()).decode("ascii")
    url = f"data:image/{item.image_format.lower()};base64,{body}"
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    return parts if item.is_image_first else parts[::-1]
