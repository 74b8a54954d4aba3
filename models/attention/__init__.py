"""Attention over the paged pools, by several backends; each is imported when first used.

This file registers the backends by name. In the order in which to read the others:

    base                                  the interface, and the rows of a step
    int8_states                           images' keys and values in int8
    sdpa                                  the reference backend: torch's SDPA on gathered keys
    paged_on_cpu                          decodes on a CPU by this project's C
    work_items                            cuts the keys of long rows into pieces
    triton_paged, triton_kernels          this project's kernels
    flash, tiles                          what both FlashAttention backends share
    flash_attn_package, torch_varlen      the two of them
    choice, trial                         which backend a run uses, and its trial before use
"""

from __future__ import annotations

from importlib import import_module

from ..errors import ModelError
from .base import AttentionBackend, Geometry, PagedRows

__all__ = [
    "AttentionBackend",
    "Geometry",
    "PagedRows",
    "backend_class",
    "backend_names",
    "get_backend",
]

# name -> module and class; a backend's dependencies are imported only with its module
_BACKENDS: dict[str, tuple[str, str]] = {
    "sdpa": (".sdpa", "SdpaBackend"),
    "cpu": (".paged_on_cpu", "CpuBackend"),
    "flash_attn": (".flash_attn_package", "FlashAttnBackend"),
    "varlen": (".torch_varlen", "VarlenBackend"),
    "triton": (".triton_paged", "TritonBackend"),
}


def backend_names() -> list[str]:
    """The registered names, in order."""
    return list(_BACKENDS)


def backend_class(name: str) -> type[AttentionBackend]:
    """The class of that name. Raises ModelError for a name that is not registered."""
    if name not in _BACKENDS:
        raise ModelError(f"attention backend {name!r} is unknown: use one of {backend_names()}")
    module, class_name = _BACKENDS[name]
    found: type[AttentionBackend] = getattr(import_module(module, __package__), class_name)
    return found


def get_backend(name: str) -> AttentionBackend:
    """A backend of that name. Raises ModelError for a name that is not registered."""
    return backend_class(name)()
