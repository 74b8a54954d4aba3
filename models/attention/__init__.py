"""The attention backends by name, each imported when it is first asked for.

Owns the list of names. Knows nothing of how a backend computes.
"""

from __future__ import annotations

from importlib import import_module

from ..errors import ModelError
from .base import AttentionBackend, PagedRows

__all__ = ["AttentionBackend", "PagedRows", "backend_names", "get_backend"]

# name -> module and class; a backend's own dependencies load only with its module
_BACKENDS: dict[str, tuple[str, str]] = {"sdpa": (".sdpa", "SdpaBackend")}


def backend_names() -> list[str]:
    """The names that `get_backend` takes, in order of the registry."""
    return list(_BACKENDS)


def get_backend(name: str) -> AttentionBackend:
    """A backend of that name. Raises ModelError for a name that is not registered."""
    if name not in _BACKENDS:
        raise ModelError(f"attention backend {name!r} is unknown: use one of {backend_names()}")
    module, class_name = _BACKENDS[name]
    backend: AttentionBackend = getattr(import_module(module, __package__), class_name)()
    return backend
