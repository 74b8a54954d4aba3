"""Says whether decode steps of a model are recorded, and why not.

Owns the conditions. Knows nothing of how a step is recorded.
"""

from __future__ import annotations

from ...attention import AttentionBackend
from ...decoder.decoder import is_fused
from ...weights.loader import LoadedModel


def why_not(loaded: LoadedModel, backend: AttentionBackend, is_asked: bool = True) -> str | None:
    """Why decode steps run eager, in a few words; None where they are recorded.

    is_asked: False for `--no-cuda-graphs`.
    """
    if not is_asked:
        return "--no-cuda-graphs"
    if loaded.device.type != "cuda":
        return f"they need a CUDA device, and this is {loaded.device}"
    if loaded.placement.single is None:
        return "accelerate's hooks split the model"
    if loaded.num_ranks > 1:
        return "the sums over several ranks have not been recorded on hardware yet"
    if not is_fused(loaded.model.model.language_model):
        return "the decoder keeps transformers' layers"
    if backend.name != "triton":
        return f"attention is by {backend.name}; --attention-backend triton has them"
    return None
