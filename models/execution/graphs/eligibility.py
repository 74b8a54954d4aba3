"""Decides whether a model's decode steps can be recorded."""

from __future__ import annotations

from ...attention import AttentionBackend
from ...decoder.decoder import is_fused
from ...weights.loader import LoadedModel


def why_not(loaded: LoadedModel, is_asked: bool = True) -> str | None:
    """Why a model's decode steps run eager, in a few words; None if they can be recorded.

    is_asked: False with `--no-cuda-graphs`. `why_not_with` answers for the attention backend.
    """
    if not is_asked:
        return "--no-cuda-graphs"
    if loaded.device.type != "cuda":
        return f"they need a CUDA device, and this is {loaded.device}"
    if loaded.placement.single is None:
        return "accelerate's hooks split the model"
    if loaded.num_ranks > 1:
        return "sums over ranks are not recorded yet"
    if not is_fused(loaded.model.model.language_model):
        return "the decoder uses transformers' layers"
    return None


def why_not_with(backend: AttentionBackend) -> str | None:
    """Why steps with this attention backend run eager, in a few words; None if they need not."""
    if backend.name != "triton":
        return f"the attention backend is {backend.name}; they need --attention-backend triton"
    return None
