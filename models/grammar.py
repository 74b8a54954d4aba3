"""Which tokens a grammar allows next: compiled grammars, matchers, and the masks of a step's rows.

Owns llguidance. Imports no torch: a mask is bits in numpy.

A grammar is compiled once and copied for each sequence. Compiling and filling masks run without
Python's global lock. A matcher that reaches one of its limits does not raise; it reports
`has_failed`.
"""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import (
    fill_next_token_bitmask_par,
    fill_next_token_bitmask_par_with_draft_tokens,
)
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .eos_tokens import configured_end_ids, end_token_ids
from .errors import GrammarError

# A compiled grammar takes up to 62 times its text: 48 MiB for all of them.
MAX_COMPILED = 64
MAX_COMPILED_BYTES = 786_432
SILENT = 0
# How llguidance names a text that is not complete and that no token can extend.
DEAD_END = "NoExtensionBias"
_LIMITS = LLParserLimits(max_lexer_states=20_000)


class Matcher:
    """One sequence's position in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.inner = matcher

    @property
    def has_failed(self) -> bool:
        """True after the matcher reached a limit or a dead end, or got a forbidden token."""
        return bool(self.inner.is_error())

    @property
    def is_in_dead_end(self) -> bool:
        """True if it failed because no token can follow, though the text is not complete."""
        return self.has_failed and self.inner.get_error().startswith(DEAD_END)

    def accept(self, token_id: int) -> None:
        """Advance past this token, which the mask allowed."""
        self.inner.consume_token(token_id)

    def num_allowed(self, token_ids: list[int]) -> int:
        """How many of these tokens, from the first, may follow one after the other."""
        return 0 if self.has_failed else int(self.inner.validate_tokens(token_ids))

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, as the tokenizer cuts it; often none.

        Other tokens may spell the same text, so a mask may allow more than these.
        """
        return [] if self.has_failed else list(self.inner.compute_ff_tokens())

    def copy(self) -> Matcher:
        """A matcher at the same position, for another sequence."""
        return Matcher(self.inner.deep_copy())


class Grammars:
    """Compiles grammars for one checkpoint's tokenizer and fills masks for its vocabulary.

    vocab_size: of the logits. The tokenizer is read here, because that keeps Python's lock (for a
    second at 128,256 entries). A folder without a tokenizer supports no grammars.
    unsupported: why no grammar can be compiled, one line; None: they can.
    """

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._compiled: OrderedDict[tuple[str, str, tuple[int, ...]], Matcher] = OrderedDict()
        self._executor: LLExecutor | None = None
        self._mask_size = vocab_size
        self._num_bytes = 0
        self._source = ""
        self._end_token_ids: tuple[int, ...] = ()
        self.unsupported: str | None = None
        try:
            self._read(Path(folder))
        except GrammarError as error:
            self.unsupported = str(error)

    def compile(self, grammar: str, eos_token_ids: Sequence[int] = (), tenant: str = "") -> Matcher:
        """A matcher at the grammar's start. Compiled grammars are cached for each tenant.

        grammar: llguidance's JSON. eos_token_ids: tokens that may end a complete text; by default
        the checkpoint's. Caching by tenant prevents a client from learning, by timing, that another
        client sent the same grammar. Raises GrammarError, one line, if it cannot be compiled.
        """
        key = (tenant, grammar, tuple(sorted(set(eos_token_ids))) or self._end_token_ids)
        known = self._compiled.get(key)
        if known is None:
            known = self._compiled[key] = self.compile_anew(grammar, key[2])
            self._num_bytes += len(grammar)
            while len(self._compiled) > MAX_COMPILED or self._num_bytes > MAX_COMPILED_BYTES:
                (_, oldest, _), _ = self._compiled.popitem(last=False)
                self._num_bytes -= len(oldest)
            return known.copy()
        self._compiled.move_to_end(key)
        return known.copy()

    def compile_anew(self, grammar: str, eos_token_ids: tuple[int, ...] = ()) -> Matcher:
        """The same without the cache. Raises GrammarError."""
        tokenizer = self._tokenizer(eos_token_ids or self._end_token_ids)
        matcher = LLMatcher(tokenizer, grammar, log_level=SILENT, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(" ".join(matcher.get_error().split())[:300])
        return Matcher(matcher)

    def _read(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            return
        source = file.read_text("utf-8")
        tokenizer = Tokenizer.from_str(source)
        self._source = _with_unspeakable_specials(source)
        # The tokenizer may have ids beyond the logits, such as `<|image|>`.
        last_id = max(tokenizer.get_vocab().values())
        self._mask_size = max(self._vocab_size, last_id + 1)
        self._end_token_ids = tuple(end_token_ids(tokenizer, configured_end_ids(folder)))
        if not self._end_token_ids:
            raise GrammarError("the checkpoint names no end token")
        self._tokenizer(self._end_token_ids)

    def _tokenizer(self, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
        """llguidance's tokenizer with these end tokens. Raises GrammarError."""
        if eos_token_ids not in self._tokenizers:
            size, ends = self._mask_size, list(eos_token_ids)
            try:
                known = LLTokenizer(self._source, n_vocab=size, eos_token=ends)
            except Exception as error:  # the library raises no narrower type
                reason = " ".join(str(error).split())[:200]
                raise GrammarError(f"the tokenizer does not support grammars: {reason}") from error
            self._tokenizers[eos_token_ids] = known
        return self._tokenizers[eos_token_ids]

    def fill(
        self, matchers: Sequence[Matcher], drafts: Sequence[list[int]] | None = None
    ) -> NDArray[np.uint8]:
        """Which tokens may come next, a bit each, uint8 [num_rows, ceil(vocab_size / 8)].

        drafts: tokens behind each matcher; None: none. A matcher has one row, and one behind each
        of its drafts. The rows behind a forbidden draft allow anything or nothing. No matcher
        changes its position.

        Token i is bit i % 8 of byte i // 8, lowest bit first. A row that would allow no token,
        because its matcher failed, allows one end token alone: its request ends with this step.
        """
        drafts = drafts or [[] for _ in matchers]
        firsts = list(itertools.accumulate((1 + len(one) for one in drafts), initial=0))
        masks = np.zeros((firsts[-1], -(-self._mask_size // 32)), dtype=np.int32)
        at = [
            (matcher.inner, row, tokens)
            for matcher, row, tokens in zip(matchers, firsts, drafts, strict=False)
            if not matcher.has_failed
        ]
        if self._executor is None:
            self._executor = LLExecutor()
        if with_drafts := [one for one in at if one[2]]:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, with_drafts, masks)
        if without := [one[:2] for one in at if not one[2]]:
            fill_next_token_bitmask_par(self._executor, without, masks)
        num_bytes, num_odd = -(-self._vocab_size // 8), self._vocab_size % 8
        allowed = masks.view(np.uint8)[:, :num_bytes]
        if num_odd:
            allowed[:, -1] &= (1 << num_odd) - 1
        ends = [one for one in self._end_token_ids if one < self._vocab_size] or [0]
        if self._vocab_size:
            allowed[~allowed.any(axis=1), ends[0] // 8] = 1 << ends[0] % 8
        return allowed


def _with_unspeakable_specials(source: str) -> str:
    """A tokenizer's JSON whose special tokens have names that no grammar contains.

    llguidance tokenizes the text that a grammar forces. Text that contains `<|eot_id|>` would
    otherwise become that special token.
    """
    content = msgspec.json.decode(source)
    nonce = secrets.token_hex(16)
    vocabulary = content.get("model", {}).get("vocab")
    for token in content.get("added_tokens", ()):
        if token.get("special"):
            name = f"<|{nonce}-{token['id']}|>"
            # Some tokenizers have it among their ordinary tokens too: it must keep its id there.
            if isinstance(vocabulary, dict) and token["content"] in vocabulary:
                vocabulary[name] = vocabulary.pop(token["content"])
            token["content"] = name
    return msgspec.json.encode(content).decode()
