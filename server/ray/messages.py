"""What travels between the ingress and the replicas of engines: plain data, which Ray pickles."""

from __future__ import annotations

from dataclasses import dataclass, field

Headers = list[tuple[bytes, bytes]]
# How long a request waits for a replica that takes it.
ACCEPT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """An HTTP request, and what the router needs for its choice.

    target: path and query as they were sent. keys: see `replica_chooser`. weight: its load, in
    answers. sender: the process that chooses. tried: replicas that rejected it or died. only: the
    one replica that can answer it.
    """

    method: str
    target: bytes
    # Ray may log its repr: no keys and no content.
    headers: Headers = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    keys: tuple[bytes, ...] = ()
    weight: float = 0.0
    sender: str = ""
    tried: frozenset[str] = frozenset()
    only: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first item of every answer: the replica that sends it."""

    replica: str


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """The second item. body: the whole body, or None if pieces of it follow."""

    status: int
    headers: Headers
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """A replica's answer in one item."""

    replica: str
    head: AnswerHead
