"""The operations between a decoder's products by this project's C, where a compiler is installed.

A norm of a few rows is six operations of torch, each of which costs more than its arithmetic. In C
it is one. torch's compiler gains nothing here: a call of what it compiles takes longer than the
operations that it replaces (docs/log.md).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import c_library
from .c_library import FLOAT, NUMBER, POINTER, SIZE

SOURCE = Path(__file__).with_name("row_operations.c")
# the order of the C file's kinds
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
# head_dim / 2 and the MLP's width must be a multiple of the most numbers of a vector
_MAX_LANES = 16


def fits(dtype: torch.dtype, inner: int, head_dim: int) -> bool:
    """Whether the C is there, and takes numbers of this type and a model of these sizes."""
    is_whole = inner % _MAX_LANES == 0 and head_dim % (2 * _MAX_LANES) == 0
    return dtype in _KINDS and is_whole and _library() is not None


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of [num_tokens, hidden], rounded once."""
    num_tokens, hidden = states.shape
    states = states if states.stride(1) == 1 else states.contiguous()
    result = torch.empty(num_tokens, hidden, dtype=states.dtype)
    _function("rms_norm")(
        _KINDS[states.dtype],
        num_tokens,
        hidden,
        states.data_ptr(),
        states.stride(0),
        weight.data_ptr(),
        eps,
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def silu_gated(joined: Tensor) -> Tensor:
    """silu(gate) * up of [num_tokens, 2 * width], gate first; rounded once."""
    joined = joined.contiguous()
    num_tokens, width = len(joined), joined.shape[1] // 2
    result = torch.empty(num_tokens, width, dtype=joined.dtype)
    _function("silu_gated")(
        _KINDS[joined.dtype],
        num_tokens,
        width,
        joined.data_ptr(),
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


def rotate_and_write(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    num_heads: int,
) -> Tensor:
    """The rotated queries, [num_tokens, num_heads, head_dim]; writes keys and values to slots.

    joined: [num_tokens, all heads side by side], queries, keys, values; caches: one layer's.
    """
    num_kv_heads, head_dim = key_cache.shape[-2:]
    joined, cos, sin = joined.contiguous(), cos.contiguous(), sin.contiguous()
    query = torch.empty(len(joined), num_heads, head_dim, dtype=joined.dtype)
    _function("rotate_and_write")(
        _KINDS[joined.dtype],
        len(joined),
        num_heads,
        num_kv_heads,
        head_dim,
        joined.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slots.data_ptr(),
        torch.get_num_threads(),
    )
    return query


@functools.cache
def _function(name: str) -> Callable[..., None]:
    library = _library()
    assert library is not None, "ask fits() first"
    function: Callable[..., None] = getattr(library, name)
    return function


@functools.cache
def _library() -> ctypes.CDLL | None:
    return c_library.load(
        SOURCE,
        rms_norm=[NUMBER, SIZE, SIZE, POINTER, SIZE, POINTER, FLOAT, POINTER, NUMBER],
        silu_gated=[NUMBER, SIZE, SIZE, POINTER, POINTER, NUMBER],
        rotate_and_write=[NUMBER, *[SIZE] * 4, *[POINTER] * 7, NUMBER],
    )
