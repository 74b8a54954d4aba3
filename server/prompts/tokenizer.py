"""Reads a checkpoint's tokenizer, and encodes text in which no token is special.

Knows nothing of prompts or templates.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file. Raises FileNotFoundError or ValueError that names it."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: it is not a whole checkpoint")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The tokenizers library raises nothing more special.
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a text, without special tokens around it."""
    if not text:
        return []
    # As a batch: only that lets other threads run meanwhile, the event loop's among them.
    token_ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return token_ids


def plain_twin(tokenizer: Tokenizer) -> Tokenizer:
    """A copy for users' text, to which no token is special."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    added = plain.get_added_tokens_decoder().values()
    # A token that was added but not marked special would still be recognised.
    plain.add_special_tokens([AddedToken(t.content, special=True) for t in added if not t.special])
    plain.encode_special_tokens = True
    return plain
