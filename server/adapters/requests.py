"""What clients send to load and unload adapters, in vLLM's form."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

# Constraints that JSON schema cannot express, for the API's document.
FOLDER_RULE = (
    "lora_path is below the server's --lora-root, symlinks included, and has an adapter that the"
    " server can use."
)
NAME_RULE = (
    "lora_name starts with a letter or digit, has only these and . _ : / @ + -, and is no name of"
    " the model; nor of an adapter, unless load_inplace is true."
)

AdapterName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class LoadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """lora_path: a folder below --lora-root, absolute or from there. load_inplace: replace the
    adapter that has this name.
    """

    prose_rules: ClassVar = (FOLDER_RULE, NAME_RULE)

    lora_name: AdapterName
    lora_path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    load_inplace: bool | None = None


class UnloadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The name of a served adapter."""

    lora_name: AdapterName
