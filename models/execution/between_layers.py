"""Calls back before each decoder layer of a step, so that another step may be computed there.

A layer keeps no state between two calls. So the two steps share only the caches, in which the
scheduler gives them different blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..decoder.decoder import LayerCount


class BetweenLayers:
    """The callback of one runner. is_inside: it runs, so a step now is inside another."""

    def __init__(self, layers: LayerCount) -> None:
        self._layers = layers
        self.callback: Callable[[], None] | None = None
        self.is_inside = False

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Within the context, layers call back; not those of a step inside another."""
        if self.callback is None or self.is_inside:
            yield
            return
        self._layers.before_each = self._call
        try:
            yield
        finally:
            self._layers.before_each = None

    def _call(self) -> None:
        if self.is_inside or self.callback is None:
            return
        self.is_inside = True
        try:
            self.callback()
        finally:
            self.is_inside = False
