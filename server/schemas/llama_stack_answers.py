"""What a client of Llama Stack reads: the plain answer and the events.

Owns keys and their order, and the two styles of clients: the /v1/ line expects
typed deltas and always a `tool_calls`. Knows nothing of how they are sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..generation import Answer, Finish, TextDelta


@dataclass(slots=True, frozen=True)
class StackAnswers:
    """The answers to one request. is_new: it came on a /v1/ path."""

    is_new: bool

    def plain(self, answer: Answer) -> dict[str, Any]:
        """The whole answer, as api-reference.txt shows it."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text,
            "stop_reason": _stop_reason(answer.finish),
        }
        if self.is_new:
            message["tool_calls"] = []
        return {"completion_message": message, "logprobs": None}

    def first(self) -> dict[str, Any]:
        """The event before any text."""
        return self._event("start", "")

    def chunks(self, event: TextDelta | Finish) -> list[dict[str, Any]]:
        """The events that tell of one event of the answer."""
        if isinstance(event, TextDelta):
            return [self._event("progress", event.text)]
        return [self._event("complete", "", _stop_reason(event))]

    def _event(self, kind: str, text: str, stop_reason: str | None = None) -> dict[str, Any]:
        return {
            "event": {
                "event_type": kind,
                "delta": {"type": "text", "text": text} if self.is_new else text,
                "logprobs": None,
                "stop_reason": stop_reason,
            }
        }


def _stop_reason(finish: Finish) -> str:
    if finish.reason == "length":
        return "out_of_tokens"
    return "end_of_message" if finish.is_end_of_message else "end_of_turn"
