"""The backend `flash_attn`: the kernels of the package flash-attn, FlashAttention 2.

Maps a call to the package's arguments, as in flash_attn 2.8, flash_attn_interface.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .flash import FlashBackend, PagedCall
from .tiles import RaggedCall

NOT_INSTALLED = "the package flash-attn is not installed (pip install 'vlmserve[flash]')"


@dataclass(slots=True, frozen=True)
class FlashAttnKernels:
    """The package's functions of these names."""

    varlen: Callable[..., Any]
    with_kvcache: Callable[..., Any]


def import_kernels() -> FlashAttnKernels:
    """The installed package's kernels. Raises ImportError."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    return FlashAttnKernels(flash_attn_varlen_func, flash_attn_with_kvcache)


class FlashAttnBackend(FlashBackend):
    """Uses the kv-cache form, which splits long keys, for decodes, else the varlen form."""

    name: ClassVar[str] = "flash_attn"

    def __init__(self, kernels: FlashAttnKernels | None = None) -> None:
        """kernels: default: those of the installed package."""
        self._kernels = kernels or import_kernels()

    @classmethod
    def why_not_importable(cls) -> str | None:
        try:
            kernels = import_kernels()
        except ModuleNotFoundError:
            return NOT_INSTALLED
        except ImportError as error:  # built for another torch or CUDA
            return f"the package flash-attn does not load ({' '.join(str(error).split())[:120]})"
        if "block_table" not in inspect.signature(kernels.varlen).parameters:
            return "the installed flash-attn has no block tables: it needs 2.8"
        return None

    def attend_paged(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, call: PagedCall, scale: float
    ) -> Tensor:
        if call.max_queries == 1:
            return self._decode(query, key_cache, value_cache, call, scale)
        output: Tensor = self._kernels.varlen(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q=call.query_starts,
            cu_seqlens_k=call.key_starts,
            max_seqlen_q=call.max_queries,
            max_seqlen_k=call.max_keys,
            softmax_scale=scale,
            causal=call.is_causal,
            block_table=call.block_table,
        )
        return output

    def _decode(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, call: PagedCall, scale: float
    ) -> Tensor:
        output: Tensor = self._kernels.with_kvcache(
            query[:, None],
            key_cache,
            value_cache,
            cache_seqlens=call.key_lens,
            block_table=call.block_table,
            softmax_scale=scale,
            causal=call.is_causal,
        )
        return output[:, 0]

    def attend_ragged(
        self, query: Tensor, keys: Tensor, values: Tensor, call: RaggedCall, scale: float
    ) -> tuple[Tensor, Tensor]:
        # without dropout, return_attn_probs adds only the log-sum-exp
        output, lse, _ = self._kernels.varlen(
            query,
            keys,
            values,
            cu_seqlens_q=call.query_starts,
            cu_seqlens_k=call.key_starts,
            max_seqlen_q=call.max_queries,
            max_seqlen_k=call.max_keys,
            softmax_scale=scale,
            causal=False,
            return_attn_probs=True,
        )
        return output, lse
