"""A coded weight: decode, cut, join.

Owns the tensors of a coded weight. Knows nothing of layers or of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Coding

# the largest number of FP8 E4M3
FP8_LARGEST = 448.0
# float16's number over the FP8 number with the same bits; sign, and the seven other bits of FP8
_HALF_RATIO, _HALF_BITS = 2.0**8, -(1 << 15) | (127 << 7)
# of a weight that is quantized at once: 64 MiB in float32
_CHUNK_ELEMENTS = 1 << 24
_INT4_TABLE = tuple(float(code - 8) for code in range(16))


@dataclass(slots=True, frozen=True)
class CodedWeight:
    """codes: [out, in] int8, or uint8 with the bits of FP8; [out, in / 2] uint8 of 4-bit codes.

    scales: float32 [out, groups]; zeros: int16 [out, groups], or None. table: float32 [16] of
    TABLE4. order: int64 [in], the input that each stored column multiplies; None: as they come.
    """

    coding: Coding
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        num_out, num_codes = self.codes.shape
        return num_out, num_codes * 8 // self.coding.bits

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def pairs(self) -> Tensor | None:
        """Both values of each byte of 4-bit codes, float32 [256, 2]; None of other codings."""
        if self.coding.bits != 4:
            return None
        table = self.table
        if table is None:
            table = torch.tensor(_INT4_TABLE, device=self.codes.device)
        byte = torch.arange(256, device=self.codes.device)
        return torch.stack((table[byte & 15], table[byte >> 4]), dim=1).float()

    def decode(
        self, rows: slice = slice(None), *, dtype: torch.dtype, pairs: Tensor | None = None
    ) -> Tensor:
        """Outputs of a slice in `dtype`, [n, in], columns in stored order. pairs: see `pairs`."""
        codes, scales = self.codes[rows], self.scales[rows]
        if self.coding.bits == 4:
            pairs = self.pairs() if pairs is None else pairs
            assert pairs is not None
            # both values as one word: torch copies rows of two numbers one by one
            values = pairs.view(torch.int64).flatten().index_select(0, codes.flatten().int())
            values = values.view(torch.float32)
        elif self.coding is Coding.FP8:
            values, scales = _halves(codes).float(), scales * _HALF_RATIO
        else:
            values = codes.float()
        values = values.view(len(codes), scales.shape[1], -1)
        if self.zeros is not None:
            values -= self.zeros[rows][..., None]
        values *= scales[..., None]
        return values.view(len(codes), -1).to(dtype)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`, columns in their own order."""
        decoded = self.decode(dtype=dtype)
        if self.order is None:
            return decoded
        ordered = torch.empty_like(decoded)
        ordered[:, self.order] = decoded
        return ordered

    def to(self, device: torch.device) -> CodedWeight:
        """The weight on a device."""
        moved = {name: getattr(self, name) for name in ("zeros", "table", "order")}
        return CodedWeight(
            self.coding,
            self.codes.to(device),
            self.scales.to(device),
            **{name: None if one is None else one.to(device) for name, one in moved.items()},
        )

    def outputs(self, part: slice) -> CodedWeight:
        """Some of the output channels."""
        return replace(
            self,
            codes=self.codes[part].contiguous(),
            scales=self.scales[part].contiguous(),
            zeros=None if self.zeros is None else self.zeros[part].contiguous(),
        )

    def inputs(self, part: slice) -> CodedWeight:
        """Some of the inputs. Raises ValueError if that cuts a group or the order mixes them."""
        start, stop, _ = part.indices(self.shape[1])
        if self.order is not None:
            raise ValueError("its columns are stored in another order (act-order)")
        is_one_group = self.scales.shape[1] == 1
        per_byte = 8 // self.coding.bits
        unit = per_byte if is_one_group else max(self.group, per_byte)
        if start % unit or stop % unit:
            raise ValueError(f"its groups of {self.group} inputs do not divide by the ranks")
        groups = slice(None) if is_one_group else slice(start // self.group, stop // self.group)
        return replace(
            self,
            codes=self.codes[:, start // per_byte : stop // per_byte].contiguous(),
            scales=self.scales[:, groups].contiguous(),
            zeros=None if self.zeros is None else self.zeros[:, groups].contiguous(),
        )


def _halves(codes: Tensor) -> Tensor:
    """FP8 codes as float16, each smaller by 2 ** 8. torch converts float8 one by one on a CPU.

    Exponent and mantissa of E4M3 lie in those of float16. A code of NaN becomes a number.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign is in the upper byte as well
    return bits.bitwise_left_shift_(7).bitwise_and_(_HALF_BITS).view(torch.float16)


def can_join(weights: Sequence[CodedWeight]) -> bool:
    """Whether weights of the same inputs can be one weight of all their outputs."""
    first = weights[0]
    return all(
        one.coding is first.coding
        and one.scales.shape[1] == first.scales.shape[1]
        and (one.zeros is None) == (first.zeros is None)
        and _are_equal(one.table, first.table)
        and _are_equal(one.order, first.order)
        for one in weights[1:]
    )


def join(weights: Sequence[CodedWeight]) -> CodedWeight:
    """One weight with the outputs of all; see `can_join`."""
    first = weights[0]
    return replace(
        first,
        codes=torch.cat([one.codes for one in weights]),
        scales=torch.cat([one.scales for one in weights]),
        zeros=None
        if first.zeros is None
        else torch.cat([one.zeros for one in weights if one.zeros is not None]),
    )


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def quantize_fp8(weight: Tensor) -> CodedWeight:
    """The nearest FP8 E4M3 weight with one scale an output channel, on the weight's device.

    weight: floating [out, in]. Raises ValueError for a weight with NaN or infinity.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), 1, dtype=torch.float32, device=weight.device)
    size = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        part = weight[rows].float()
        largest = part.abs().amax(1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("the weight has NaN or infinity")
        scales[rows] = scale = torch.where(largest > 0, largest / FP8_LARGEST, 1.0)
        scaled = (part / scale).clamp_(-FP8_LARGEST, FP8_LARGEST)
        codes[rows] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return CodedWeight(Coding.FP8, codes, scales)
