"""What a client of the health and model routes reads.

Owns keys and their order. Knows nothing of how a server's state is found.
"""

from __future__ import annotations

import uuid
from typing import Literal, TypedDict


class ReadyAnswer(TypedDict):
    """Whether requests can be served now."""

    object: Literal["health.response"]
    message: str


class LiveAnswer(TypedDict):
    """The process answers. The object's name is the documented one."""

    object: Literal["readyhealth.response"]
    message: str


class ModelPermission(TypedDict):
    """The same for every model: what clients of this API expect to find."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: str | None
    is_blocking: bool


class ModelCard(TypedDict):
    """One name of the served model, or an adapter. max_model_len: prompt and answer, in tokens.

    root: the model's first name; of an adapter, where it is from. parent: the first name of an
    adapter's base model.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(TypedDict):
    """The served model under each of its names, and its adapters."""

    object: Literal["list"]
    data: list[ModelCard]


def model_card(
    name: str, root: str, created: int, max_model_len: int, parent: str | None = None
) -> ModelCard:
    """The card of a model's or an adapter's name."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "system",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [_permission(name, created)],
    }


def _permission(name: str, created: int) -> ModelPermission:
    # Made from the name: the same id on every call and from every worker.
    permission_id = uuid.uuid5(uuid.NAMESPACE_URL, f"vlmserve:{name}").hex
    return {
        "id": f"modelperm-{permission_id}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
