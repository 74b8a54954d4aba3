"""Parses amounts of memory on the command line, such as 8GiB."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """The bytes of "8GiB", "1.5 GB" or "500000000"; at least 1. Raises ValueError, one line.

    KiB, MiB, GiB and TiB are powers of 1024; KB, MB, GB and TB of 1000.
    """
    found = _AMOUNT.fullmatch(text.strip())
    units = {name.lower(): size for name, size in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f"{text!r} is not an amount of memory: write 8GiB, 500MB or bytes")
    number = int(float(found[1]) * units[found[2].lower()])
    if number < 1:
        raise ValueError(f"{text!r} is less than one byte")
    return number


def parse_max_memory(text: str) -> dict[str, int]:
    """Bytes by device of "0=20GiB,cpu=40GiB": GPUs by number, and cpu. Raises ValueError."""
    amounts: dict[str, int] = {}
    for entry in text.split(","):
        name, separator, amount = (part.strip() for part in entry.partition("="))
        if not separator or not (name == "cpu" or name.isdecimal()):
            raise ValueError(f"{entry!r} is not a memory limit: write it as 0=20GiB or cpu=40GiB")
        if name in amounts:
            raise ValueError(f"{text!r} names {name} twice")
        amounts[name] = parse_bytes(amount)
    return amounts
