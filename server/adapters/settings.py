"""The settings of adapters that the HTTP side needs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ...models.batch import AdapterRef
from ...models.settings.option import Option
from ...models.settings.runner_config import ADAPTERS

# From the command line, from the watched folder, or loaded by a request.
Origin = Literal["start", "source", "request"]


class ServedAdapter(msgspec.Struct, frozen=True):
    """An adapter that requests may name.

    root: where it is from, as clients may read it: a hub id, a folder's name, or the path that was
    sent. created: seconds since 1970.
    """

    ref: AdapterRef
    root: str
    created: int
    origin: Origin

    @property
    def name(self) -> str:
        return self.ref.name


class AdapterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """at_start: the adapters of --lora."""

    at_start: list[ServedAdapter] = []
    lora_source: Annotated[
        str | None,
        Option(
            "Folder whose subfolders are adapters, each under its folder's name. Subfolders that "
            "are added, changed or removed are noticed while the server runs.",
            ADAPTERS,
            metavar="FOLDER",
        ),
    ] = None
    lora_refresh_s: Annotated[
        Annotated[float, msgspec.Meta(ge=0.1)],
        Option("Seconds between two looks at --lora-source.", ADAPTERS),
    ] = 30.0
    allow_lora_updates: Annotated[
        bool,
        Option(
            "Serve /v1/load_lora_adapter and /v1/unload_lora_adapter to every client that has an "
            "API key, or to all without keys.",
            ADAPTERS,
            has_negation=False,
        ),
    ] = False
    lora_root: Annotated[
        str | None,
        Option(
            "Folder below which /v1/load_lora_adapter may read adapters. Default: --lora-source.",
            ADAPTERS,
            metavar="FOLDER",
        ),
    ] = None

    @property
    def updates_root(self) -> str | None:
        """The folder from which requests may load."""
        return self.lora_root or self.lora_source

    @property
    def may_change(self) -> bool:
        """Whether the served names change while the server runs."""
        return self.allow_lora_updates or self.lora_source is not None
