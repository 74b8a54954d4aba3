"""Decides whether a model's decode steps can be recorded."""

from __future__ import annotations

import torch

from ...attention import AttentionBackend
from ...decoder.decoder import is_fused
from ...tensor_parallel.group import Group
from ...weights.loader import LoadedModel
from ...weights.meta_model import one_line
from .recorder import Recorder


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
    if not is_fused(loaded.model.model.language_model):
        return "the decoder uses transformers' layers"
    return None


@torch.inference_mode()
def why_not_over(group: Group, recorder: Recorder, device: torch.device) -> str | None:
    """Why sums over ranks cannot be recorded here; None if they can. The same on every rank.

    Records a small sum and replays it with other values.
    """
    reason = None
    try:
        states = torch.ones(64, device=device)
        replay = recorder.record(lambda: group.add_up(states * 1.0))
        states.fill_(3.0)
        if not bool((replay() == 3.0 * group.size).all()):
            reason = "a recorded sum over ranks was wrong"
    except Exception as error:  # CUDA, NCCL and torch raise any type
        reason = f"a sum over ranks cannot be recorded: {one_line(error)}"
    return agreed(group, reason)


def agreed(group: Group, reason: str | None) -> str | None:
    """The reason of this rank or of another; None only if no rank has one."""
    (are_all_able,) = group.least([int(reason is None)])
    return reason or (None if are_all_able else "another rank cannot record them")


def why_not_with(backend: AttentionBackend) -> str | None:
    """Why steps with this attention backend run eager, in a few words; None if they need not."""
    if backend.name != "triton":
        return f"the attention backend is {backend.name}; they need --attention-backend triton"
    return None
