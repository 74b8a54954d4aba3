"""Tokens and their log-probabilities as clients read them.

Owns the text and bytes of single tokens, which may be parts of a character. Knows nothing of
requests, or any API's format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Tokenizer

from ...models.batch import PromptLogprobs, TokenLogprobs


@dataclass(slots=True, frozen=True)
class TokenText:
    """A token by itself.

    text_bytes: what it adds to the answer in UTF-8, so that those of all tokens joined are the
    answer; None for special tokens that add nothing. text: the same as a string, and
    `bytes:\\xe2\\x82` for a part of a character. byte_values: the bytes as numbers, for JSON; all
    documents share this list.
    """

    text: str
    text_bytes: bytes | None
    byte_values: list[int] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = None if self.text_bytes is None else list(self.text_bytes)
        object.__setattr__(self, "byte_values", values)


class TokenLogprob(NamedTuple):
    """A candidate for one place of the answer and its natural log-probability."""

    token: TokenText
    logprob: float


class TokenEntry(NamedTuple):
    """One generated token; top: the likeliest candidates for its place, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True, frozen=True)
class PromptCandidate:
    """A token for one place of the prompt; rank 1 is the likeliest there."""

    token_id: int
    text: str
    logprob: float
    rank: int


# For each token of a prompt: the token itself, then the likeliest ones. None: not known.
PromptEntries = tuple[tuple[PromptCandidate, ...] | None, ...]


class TokenReader:
    """Reads token ids of one tokenizer, each by itself.

    shows_special: special tokens are text of the answer. names_by_id: every token is named
    `token_id:ID`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, shows_special: bool = False, names_by_id: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._shows_special = shows_special
        self._names_by_id = names_by_id
        self._added = tokenizer.get_added_tokens_decoder()
        self._is_byte_level = "ByteLevel" in repr(tokenizer.decoder)
        # No longer than the vocabulary.
        self._known: dict[int, TokenText] = {}

    def entry(self, token_id: int, logprobs: TokenLogprobs) -> TokenEntry:
        """The log-probabilities at the place of a chosen token."""
        top = zip(self._read_all(logprobs.top_token_ids), logprobs.top_logprobs, strict=True)
        return TokenEntry(
            TokenLogprob(self.read(token_id), logprobs.logprob),
            tuple([TokenLogprob(*one) for one in top]),
        )

    def _read_all(self, token_ids: Sequence[int]) -> list[TokenText]:
        known = self._known
        # A whole answer may have a million candidates: most cost one lookup here.
        return [known.get(one) or self.read(one) for one in token_ids]

    def prompt_entries(self, prompt: list[PromptLogprobs | None]) -> PromptEntries:
        """The log-probabilities at each place of a prompt."""
        return tuple(None if one is None else self._prompt_candidates(one) for one in prompt)

    def _prompt_candidates(self, one: PromptLogprobs) -> tuple[PromptCandidate, ...]:
        top = zip(one.top_token_ids, one.top_logprobs, strict=True)
        candidates = [(one.token_id, one.logprob, one.rank)]
        candidates += [
            (token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(top, 1)
            if token_id != one.token_id
        ]
        return tuple(
            PromptCandidate(token_id, self.read(token_id).text, logprob, rank)
            for token_id, logprob, rank in candidates
        )

    def read(self, token_id: int) -> TokenText:
        """The token's text and bytes."""
        known = self._known.get(token_id)
        if known is None:
            known = self._read(token_id)
            if self._names_by_id:
                known = TokenText(f"token_id:{token_id}", known.text_bytes)
            self._known[token_id] = known
        return known

    def _read(self, token_id: int) -> TokenText:
        name: str | None = self._tokenizer.id_to_token(token_id)
        if name is None:
            # A model's vocabulary may be wider than its tokenizer's.
            return TokenText(f"token_id:{token_id}", None)
        added = self._added.get(token_id)
        if added is not None:
            is_hidden = added.special and not self._shows_special
            return TokenText(name, None if is_hidden else name.encode())
        if self._is_byte_level and all(character in _BYTES for character in name):
            return _text_of(bytes(_BYTES[character] for character in name))
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return TokenText(text, text.encode())


def _text_of(text_bytes: bytes) -> TokenText:
    try:
        return TokenText(text_bytes.decode(), text_bytes)
    except UnicodeDecodeError:
        escaped = "".join(f"\\x{byte:02x}" for byte in text_bytes)
        return TokenText(f"bytes:{escaped}", text_bytes)


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary.

    Bytes that print stand for themselves, the others follow from U+0100 on.
    Source: bytes_to_unicode of GPT-2's encoder.py.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printing)]
    alphabet = {chr(byte): byte for byte in printing}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
