"""The codings of a weight, and the bytes that a coded weight takes.

Owns names and arithmetic, without torch.

    value[out, in] = (decoded(code) - zero[out, group]) * scale[out, group]

    int8    code as a signed byte
    fp8     code as FP8 E4M3 (Micikevicius et al., 2022)
    int4    code minus 8; two codes a byte, the even input in the low nibble
    table4  the code's entry of a table of 16 values: NF4, FP4 (Dettmers et al., 2023)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

_SCALE_BYTES, _ZERO_BYTES, _ORDER_BYTES = 4, 2, 8


class Coding(StrEnum):
    """How a code becomes a number."""

    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"
    TABLE4 = "table4"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self in (Coding.INT4, Coding.TABLE4) else 8


@dataclass(slots=True, frozen=True)
class Layout:
    """A weight's coding. group: inputs that share a scale; None: all inputs of an output channel.

    has_zeros: a zero point beside each scale. has_order: columns are stored in another order.
    """

    coding: Coding
    group: int | None = None
    has_zeros: bool = False
    has_order: bool = False

    def num_groups(self, num_in: int) -> int:
        """Scales of an output channel."""
        return 1 if self.group is None else -(-num_in // self.group)

    def kept_bytes(self, shape: Sequence[int]) -> int:
        """Bytes in memory of a weight [out, in]: codes, scales, zero points, order."""
        num_out, num_in = shape
        codes = math.prod(shape) * self.coding.bits // 8
        scale = _SCALE_BYTES + (_ZERO_BYTES if self.has_zeros else 0)
        order = _ORDER_BYTES * num_in if self.has_order else 0
        return codes + num_out * self.num_groups(num_in) * scale + order

    def why_not_cut(self, num_in: int, num_ranks: int) -> str | None:
        """Why ranks cannot share a weight's inputs; None if they can."""
        if self.has_order and num_ranks > 1:
            return "its columns are stored in another order (act-order)"
        unit = max(self.group or 1, 8 // self.coding.bits)
        if num_in % (num_ranks * unit):
            return f"{num_in} inputs in groups of {unit} do not divide by {num_ranks}"
        return None

    def why_whole(self, shape: Sequence[int]) -> str | None:
        """Why a weight of that shape cannot stay coded; None if it can."""
        num_in = shape[-1]
        if len(shape) != 2:
            return "it is no matrix"
        if self.coding.bits == 4 and num_in % 2:
            return f"{num_in} inputs do not fill whole bytes"
        if self.group is not None and num_in % self.group:
            return f"groups of {self.group} do not divide its {num_in} inputs"
        return None
