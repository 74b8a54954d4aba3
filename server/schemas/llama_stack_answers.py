"""What a client of Llama Stack reads: the plain answer and the events.

Owns keys and their order, and the two styles of clients: the /v1/ line expects
typed deltas and always a `tool_calls`. Knows nothing of how they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..answers import Completion, End, Event, Finish, TextDelta
from ..logprobs import TokenEntry


@dataclass(slots=True, frozen=True)
class StackAnswers:
    """The answers to one request. is_new: it came on a /v1/ path."""

    is_new: bool

    def plain(self, completion: Completion) -> dict[str, Any]:
        """The whole answer, as api-reference.txt shows it."""
        answer = completion.answers[0]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text,
            "stop_reason": _stop_reason(answer.finish),
        }
        if self.is_new:
            message["tool_calls"] = []
        return {"completion_message": message, "logprobs": _logprobs(answer.logprobs)}

    def first(self) -> list[dict[str, Any]]:
        """The event before any text."""
        return [self._event("start", "")]

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The events that tell of one event of the answer."""
        if isinstance(event, End):
            return []
        if isinstance(event, TextDelta):
            return [self._event("progress", event.text, event.logprobs)]
        return [self._event("complete", "", event.logprobs, _stop_reason(event))]

    def _event(
        self,
        kind: str,
        text: str,
        logprobs: Sequence[TokenEntry] = (),
        stop_reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            "event": {
                "event_type": kind,
                "delta": {"type": "text", "text": text} if self.is_new else text,
                "logprobs": _logprobs(logprobs),
                "stop_reason": stop_reason,
            }
        }


def _logprobs(entries: Sequence[TokenEntry]) -> list[dict[str, Any]] | None:
    """For each token the likeliest candidates and the chosen one, by their texts.

    None where the request did not ask or no token came. Of two candidates of one
    text the likelier one is told of.
    """
    if not entries:
        return None
    return [{"logprobs_by_token": _by_token(entry)} for entry in entries]


def _by_token(entry: TokenEntry) -> dict[str, float]:
    by_token: dict[str, float] = {}
    for one in (*entry.top, entry.chosen):
        by_token.setdefault(one.token.text, one.logprob)
    return by_token


def _stop_reason(finish: Finish) -> str:
    if finish.reason == "length":
        return "out_of_tokens"
    return "end_of_message" if finish.is_end_of_message else "end_of_turn"
