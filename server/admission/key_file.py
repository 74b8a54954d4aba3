"""The API key file: one key per line, each with what it may do.

    KEY [name=..] [weight=3] [max_concurrent=8] [requests_per_minute=60] [tokens_per_minute=20000]
        [cross_priority]

Owns the lines' grammar and their errors. An error names the line by its number and an attribute by
its name; it never contains text of the file, which may be part of a key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ...router.messages import NO_POLICY, OwnerPolicy

LEAST_WEIGHT, MOST_WEIGHT = 0.01, 1_000.0
MAX_NUMBER = 10**12
NUMBERS = ("max_concurrent", "requests_per_minute", "tokens_per_minute")
ATTRIBUTES = ("name", "weight", *NUMBERS, "cross_priority")


class KeyFileError(ValueError):
    """The key file is unusable; the message is one line for the operator and contains no key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One valid key. digest: SHA-256 of the key; the key itself is not stored.

    name: for messages. requests_per_minute, tokens_per_minute: None for no limit.
    """

    digest: bytes
    name: str | None = None
    policy: OwnerPolicy = NO_POLICY
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def has_rates(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


def read_key_file(file: Path) -> list[ApiKey]:
    """The keys of a file. Blank lines and lines starting with # are skipped.

    Raises KeyFileError.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise KeyFileError(f"the API key file cannot be read: {reason}") from error
    keys: dict[bytes, tuple[int, ApiKey]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        key = _key_of(line.split(), f"line {number} of the API key file")
        first, known = keys.setdefault(key.digest, (number, key))
        if known != key:
            raise KeyFileError(
                f"line {number} of the API key file repeats the key of line {first} with other "
                "attributes: keep one of them"
            )
    if not keys:
        raise KeyFileError("the API key file contains no key: write one per line")
    return [key for _, key in keys.values()]


def digest_of(key: str) -> bytes:
    """The SHA-256 of a key's bytes."""
    # The header's own bytes: Sanic decodes them with surrogateescape too.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def owner_of_digest(digest: bytes) -> str:
    """The name of a key's share of the machine: the same in the worker's lanes and the engine.

    Empty for requests without a key. The engine has no use for the digest itself.
    """
    return hashlib.sha256(digest + b"owner").hexdigest() if digest else ""


def _key_of(words: list[str], where: str) -> ApiKey:
    values: dict[str, str] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if name not in ATTRIBUTES or bool(equals) == (name == "cross_priority"):
            raise KeyFileError(
                f"{where} has something behind its key that is not an attribute: write "
                f"{'=.., '.join(ATTRIBUTES[:-1])}=.. or {ATTRIBUTES[-1]}, and no blank in a key"
            )
        if name in values:
            raise KeyFileError(f"{where} gives {name} twice")
        values[name] = value
    numbers = {name: _whole(values[name], name, where) for name in NUMBERS if name in values}
    policy = OwnerPolicy(
        weight=_weight(values["weight"], where) if "weight" in values else 1.0,
        cross_priority="cross_priority" in values,
        max_concurrent=numbers.get("max_concurrent"),
    )
    return ApiKey(
        digest_of(words[0]),
        values.get("name") or None,
        policy,
        numbers.get("requests_per_minute"),
        numbers.get("tokens_per_minute"),
    )


def _whole(text: str, name: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 13 and 1 <= int(text) <= MAX_NUMBER):
        raise KeyFileError(f"{name} in {where} is not a whole number from 1 to {MAX_NUMBER}")
    return int(text)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise KeyFileError(
            f"weight in {where} is not a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
        )
    return weight
