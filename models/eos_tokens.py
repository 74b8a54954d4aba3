"""Which tokens end a checkpoint's turn: one rule for prompts and for grammars."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


def end_token_ids(tokenizer: Tokenizer, configured: Iterable[int]) -> list[int]:
    """The configured ids, and those of Llama 3's end tokens in the tokenizer; sorted."""
    named = (tokenizer.token_to_id(name) for name in NAMES)
    return sorted({*configured, *(token_id for token_id in named if token_id is not None)})


def configured_end_ids(folder: Path) -> list[int]:
    """The ids in the folder's generation_config.json, else in config.json; empty without both.

    transformers generates with the same: without the file it takes the text model's.
    """
    config = _read(folder / "config.json")
    text = config.get("text_config")
    candidates = (
        _read(folder / "generation_config.json"),
        text if isinstance(text, dict) else {},
        config,
    )
    found = (one.get("eos_token_id") for one in candidates)
    value: Any = next((one for one in found if one is not None), [])
    return value if isinstance(value, list) else [value]


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return content if isinstance(content, dict) else {}
