"""Chooses the attention backend of a run, and logs the reasons.

Owns the order of preference and the resulting size of text blocks.
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
# fastest first; the last runs anywhere
PREFERRED = ("flash_attn", "triton", "varlen", "cpu", "sdpa")
# Decode steps are recorded as graphs with triton only: without them the host limits small steps.
PREFERRED_WITH_GRAPHS = ("triton", "flash_attn", "varlen", "cpu", "sdpa")
REFERENCE = "sdpa"


@dataclass(slots=True, frozen=True)
class ChosenBackend:
    """A backend that works here, its tokens of a text block, and whether it reads int8 images."""

    backend: AttentionBackend
    block_size: int
    has_int8_images: bool = False


def choose_backend(
    name: str,
    geometry: Geometry,
    block_size: int | None = None,
    get: Callable[[str], AttentionBackend] = get_backend,
    with_graphs: bool = False,
) -> ChosenBackend:
    """The backend of that name, or with "auto" the fastest that works here; logs the choice.

    block_size: tokens of a text block; None uses 16, or the backend's multiple. Every backend but
    the reference is tried before it is used. with_graphs: the model's decode steps can be recorded,
    so that "auto" prefers the backend that graphs need. Raises ModelError, one line with the
    remedy, for a name that is unknown or does not work here.
    """
    reasons: list[str] = []
    preferred = PREFERRED_WITH_GRAPHS if with_graphs else PREFERRED
    for candidate in preferred if name == "auto" else (name,):
        reason, chosen = _try(candidate, geometry, block_size, get)
        if chosen is not None:
            _log_choice(chosen, reasons if name == "auto" else ["requested"])
            return chosen
        reasons.append(f"not {candidate}: {reason}")
    raise ModelError(
        f"attention backend {name!r} cannot be used: {reason}; use --attention-backend auto"
    )


def _try(
    name: str, geometry: Geometry, block_size: int | None, get: Callable[[str], AttentionBackend]
) -> tuple[str, ChosenBackend | None]:
    """The chosen backend, or the reason against it."""
    found = backend_class(name)
    multiple = found.block_multiple
    if block_size is not None and block_size % multiple:
        return f"--block-size {block_size} is not a multiple of {multiple}", None
    if (reason := found.why_not(geometry)) is not None:
        return reason, None
    try:
        backend = get(name)
    except ImportError as error:
        return f"it cannot be imported: {error}", None
    backend = backend.sized_for(geometry)
    size = block_size or max(DEFAULT_BLOCK_SIZE, multiple)
    chosen = ChosenBackend(backend, size, geometry.has_int8_images)
    wrong = None
    if name != REFERENCE:
        wrong = what_is_wrong(backend, geometry, chosen.block_size)
    return (wrong, None) if wrong else ("", chosen)


def _log_choice(chosen: ChosenBackend, reasons: list[str]) -> None:
    why = f" ({'; '.join(reasons)})" if reasons else ""
    logger.info(
        "attention by %s, blocks of %d tokens%s", chosen.backend.name, chosen.block_size, why
    )
