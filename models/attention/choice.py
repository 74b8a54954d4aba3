"""Chooses the attention backend of a run, and says in one line why it is that one.

Owns the order of preference, the size of text blocks that follows, and the line in the log. Knows
nothing of how a backend computes; `trial.py` tells whether it computes rightly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ModelError
from . import backend_class, get_backend
from .base import AttentionBackend, Geometry
from .trial import what_is_wrong

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16
# fastest first; the last one runs anywhere
PREFERRED = ("flash_attn", "triton", "varlen", "sdpa")
REFERENCE = "sdpa"


@dataclass(slots=True, frozen=True)
class Choice:
    """A backend that works here, and the tokens of a text block that go with it."""

    backend: AttentionBackend
    block_size: int


def choose_backend(
    name: str,
    geometry: Geometry,
    block_size: int | None = None,
    get: Callable[[str], AttentionBackend] = get_backend,
) -> Choice:
    """The backend of that name, or with "auto" the fastest that works here; tells the log.

    block_size: tokens of a text block; None takes 16, or what the backend needs. A backend other
    than the reference is tried before it is chosen. Raises ModelError, one line with the remedy,
    for a name that is unknown or cannot be had here.
    """
    if name != "auto":
        return _named(name, geometry, block_size, get)
    reasons: list[str] = []
    for candidate in PREFERRED:
        reason, choice = _try(candidate, geometry, block_size, get)
        if choice is not None:
            _tell(choice, reasons)
            return choice
        reasons.append(f"not {candidate}: {reason}")
    raise AssertionError("the reference backend works anywhere")


def _named(
    name: str, geometry: Geometry, block_size: int | None, get: Callable[[str], AttentionBackend]
) -> Choice:
    reason, choice = _try(name, geometry, block_size, get)
    if choice is None:
        raise ModelError(
            f"attention backend {name!r} cannot be used: {reason}; use --attention-backend auto"
        )
    _tell(choice, ["asked for"])
    return choice


def _try(
    name: str, geometry: Geometry, block_size: int | None, get: Callable[[str], AttentionBackend]
) -> tuple[str, Choice | None]:
    """The choice, or why there is none."""
    found = backend_class(name)
    multiple = found.block_multiple
    if block_size is not None and block_size % multiple:
        return f"its blocks are multiples of {multiple} tokens, --block-size is {block_size}", None
    if (reason := found.why_not(geometry)) is not None:
        return reason, None
    try:
        backend = get(name)
    except ImportError as error:
        return f"it does not load: {error}", None
    choice = Choice(backend, block_size or max(DEFAULT_BLOCK_SIZE, multiple))
    if name == REFERENCE:
        return "", choice
    if (wrong := what_is_wrong(backend, geometry, choice.block_size)) is not None:
        return wrong, None
    return "", choice


def _tell(choice: Choice, reasons: list[str]) -> None:
    why = f" ({'; '.join(reasons)})" if reasons else ""
    logger.info(
        "attention by %s, blocks of %d tokens%s", choice.backend.name, choice.block_size, why
    )
