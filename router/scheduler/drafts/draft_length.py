"""How many drafts are worth their time: in one step, and of one request.

Knows nothing of tokens. A draft costs a row of the step's products, and gives a token if it is
right. Where a step is bound by reading weights, a few rows more cost little.
"""

from __future__ import annotations

# Tokens of a step up to which it may have drafts: above, products are bound by operations. The
# second was not measured.
CPU_TOKENS, GPU_TOKENS = 16, 64
# A request whose drafts fail twice in a row drafts nothing for 2, then 4, 8, ... tokens, at most:
LONGEST_PAUSE = 64


def room_for_drafts(num_tokens: int, device: str) -> int:
    """How many drafts a step of this many tokens may have: fewer, the more requests run."""
    most = GPU_TOKENS if device.startswith("cuda") else CPU_TOKENS
    return max(0, most - num_tokens)


class DraftLength:
    """How many drafts a request gets next: more after right ones, fewer after wrong ones."""

    __slots__ = ("_length", "_most", "_num_failures", "_pause")

    def __init__(self, most: int) -> None:
        """most: --num-speculative-tokens."""
        self._most = most
        self._length = min(most, 4)
        self._num_failures = self._pause = 0

    def take(self) -> int:
        """How many drafts the next step may have; 0 during a pause, which this shortens."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

    def record(self, num_drafts: int, num_right: int) -> None:
        """How many drafts, from the first, were right in the last step."""
        if num_right:
            self._num_failures = 0
            longer = 2 * num_drafts if num_right == num_drafts else num_right + 1
            self._length = min(self._most, max(longer, 1))
            return
        self._num_failures += 1
        self._length = max(1, num_drafts // 2)
        if self._num_failures > 1:
            self._pause = min(2 ** (self._num_failures - 1), LONGEST_PAUSE)
