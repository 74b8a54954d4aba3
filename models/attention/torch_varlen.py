"""The backend `varlen`: torch's own `torch.nn.attention.varlen.varlen_attn`.

Maps a call to that function's arguments, as in torch 2.13; torch 2.11 has neither `block_table` nor
`seqused_k`.

The function calls FlashAttention 2, unless the process activated a later version
(`torch.nn.attention.activate_flash_attention_impl`). FlashAttention 2 needs the cumulative capacity
of the rows' blocks beside the block table; later versions reject it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .flash import FlashBackend, PagedCall
from .tiles import RaggedCall

NEEDED = ("block_table", "seqused_k", "enable_gqa", "return_aux")
CAUSAL, FULL = (-1, 0), (-1, -1)


class VarlenBackend(FlashBackend):
    """Attention by `varlen_attn`; needs only a CUDA build of torch."""

    name: ClassVar[str] = "varlen"

    def __init__(
        self, varlen_attn: Callable[..., Any] | None = None, impl: str | None = None
    ) -> None:
        """varlen_attn, impl: default: torch's function and its active implementation."""
        self._varlen_attn = varlen_attn or _import_function()
        self._needs_key_starts = (impl or _active_impl()) == "FA2"

    @classmethod
    def why_not_importable(cls) -> str | None:
        try:
            parameters = inspect.signature(_import_function()).parameters
        except ImportError:
            parameters = inspect.signature(lambda: None).parameters
        if missing := [name for name in NEEDED if name not in parameters]:
            return f"torch {torch.__version__} has no varlen_attn with {missing[0]}: it needs 2.13"
        return None

    def attend_paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, call: PagedCall, scale: float
    ) -> Tensor:
        output: Tensor = self._varlen_attn(
            query,
            key_cache,
            value_cache,
            call.query_starts,
            call.capacity_starts if self._needs_key_starts else None,
            call.max_queries,
            call.block_table.shape[1] * call.block_size,
            scale=scale,
            window_size=CAUSAL if call.is_causal else FULL,
            enable_gqa=True,
            seqused_k=call.key_lens,
            block_table=call.block_table,
        )
        return output

    def attend_ragged(
        self, query: Tensor, keys: Tensor, values: Tensor, call: RaggedCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.varlen import AuxRequest

        output, lse = self._varlen_attn(
            query,
            keys,
            values,
            call.query_starts,
            call.key_starts,
            call.max_queries,
            call.max_keys,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=FULL,
        )
        # the documentation has tokens first; the kernels return heads first
        assert lse.shape == (query.shape[1], len(query)), "log-sum-exp is [heads, queries]"
        return output, lse


def _import_function() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _active_impl() -> str:
    """The name of the active implementation; the default is FlashAttention 2."""
    import torch.nn.attention as attention

    current = getattr(attention, "current_flash_attention_impl", lambda: None)
    return current() or "FA2"
