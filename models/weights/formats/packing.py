"""Takes codes out of 32-bit words, and puts 4-bit codes into bytes.

Owns bit order: the first code is in a word's lowest bits. Knows no format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ModelError
from .coded_tensor import CodedTensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n] to uint8 codes [rows, n * 32 / bits]. bits: 4 or 8."""
    found = words.contiguous().view(torch.uint8)
    if bits == 8:
        return found
    return torch.stack((found & 15, found >> 4), dim=-1).view(len(found), -1)


def nibble_pairs(codes: Tensor) -> Tensor:
    """uint8 4-bit codes [rows, n] to bytes [rows, n / 2], the even code in the low nibble."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def ordered(
    codes: Tensor, group_index: Tensor | None, tensor: CodedTensor
) -> tuple[Tensor, Tensor | None]:
    """Columns sorted by their groups, and each column's input; None if they are sorted already.

    Raises ModelError if the groups are not equally large.
    """
    num_in = tensor.shape[1]
    group = tensor.layout.group or num_in
    if group_index is None or bool((group_index < 0).all()):
        return codes, None
    wanted = torch.arange(num_in, device=group_index.device) // group
    if torch.equal(group_index.long(), wanted):
        return codes, None
    order = torch.argsort(group_index.long(), stable=True)
    if not torch.equal(group_index.long()[order], wanted):
        raise ModelError(f"{tensor.name}: groups of its g_idx do not have {group} inputs each")
    return codes[:, order], order
