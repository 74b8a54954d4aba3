"""Which tokens end a checkpoint's turn: one rule for prompts and for grammars."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def end_token_ids(tokenizer: Tokenizer, configured: Iterable[int]) -> list[int]:
    """The configured ids, and those of Llama 3's end tokens in the tokenizer; sorted."""
    named = (tokenizer.token_to_id(name) for name in NAMES)
    return sorted({*configured, *(token_id for token_id in named if token_id is not None)})


def configured_end_ids(folder: Path) -> list[int]:
    """The ids in the folder's generation_config.json; empty without that file."""
    file = folder / "generation_config.json"
    value = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.exists() else None
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
