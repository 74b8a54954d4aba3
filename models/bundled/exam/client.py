"""Puts an exam to any running OpenAI-compatible server over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2

from ..pictures import data_url
from .exam import Item, Result


class ClientError(Exception):
    """The server could not be reached or returned an error; the message has the details."""


@dataclass(frozen=True, slots=True)
class Client:
    """A server's API.

    url: with its version, such as http://127.0.0.1:8000/v1. temperature: sent with each request;
    None sends no sampling field.
    """

    url: str
    temperature: float | None = 0.0
    model: str | None = None
    api_key: str | None = None
    timeout_s: float = 120.0

    def put(self, items: list[Item], concurrency: int = 8) -> list[Result]:
        """A result for each item, in order, with `concurrency` requests at a time."""
        model = self.model or self.first_model()
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda item: self._put(item, model), items))

    def first_model(self) -> str:
        """The first model that the server lists."""
        return str(self._request("GET", "/models")["data"][0]["id"])

    def _put(self, item: Item, model: str) -> Result:
        body: dict[str, Any] = {"model": model, "messages": messages_of(item)}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        reply = self._request("POST", "/chat/completions", body)
        answer = reply["choices"][0]["message"]["content"] or ""
        return Result(item, is_right=answer.strip() == item.answer, answer=answer)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        url = self.url.rstrip("/") + path
        try:
            reply = httpx2.request(
                method, url, json=body, headers=headers, timeout=self.timeout_s, trust_env=False
            )
        except httpx2.TransportError as error:
            raise ClientError(f"{self.url} cannot be reached: {error}") from error
        if reply.is_error:
            raise ClientError(f"{path}: status {reply.status_code}: {reply.text[:500]}")
        return reply.json()


def messages_of(item: Item) -> list[dict[str, Any]]:
    """The item as the messages of a chat request."""
    messages: list[dict[str, Any]] = []
    if item.system:
        messages.append({"role": "system", "content": item.system})
    for text, answer in item.turns:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    messages.pop()  # the server gives the last answer
    if item.picture is not None:
        first = messages[1 if item.system else 0]
        url = data_url(item.picture, item.image_format)
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": first["content"]},
        ]
        first["content"] = content if item.is_image_first else content[::-1]
    return messages
