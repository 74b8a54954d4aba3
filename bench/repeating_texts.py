"""Prompts whose answers repeat them, and such answers: what drafts by prompt lookup are for.

Owns the texts alone, made from a seed. Knows nothing of tokens.

    json        records in prose, and their JSON
    table       records in prose, and a table of them
    question    records, a question about them with its answer, and a second question, whose answer
                repeats the first in part
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

KINDS = ("json", "table", "question")
NAMES = ["Ada", "Bruno", "Clara", "Dario", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas"]
SURNAMES = ["Arendt", "Bell", "Castro", "Diaz", "Ekman", "Fischer", "Gomez", "Haas", "Ito"]
TOWNS = ["Bergen", "Cádiz", "Delft", "Essen", "Faro", "Gdansk", "Halle", "Izmir", "Jena", "Kyoto"]


@dataclass(frozen=True, slots=True)
class Record:
    """A person's payment."""

    name: str
    town: str
    born: str
    amount: str

    @property
    def sentence(self) -> str:
        return f"{self.name} of {self.town}, born on {self.born}, paid {self.amount} euros."


def texts_of(kind: str, seed: int, num_records: int) -> tuple[str, str]:
    """A prompt of this kind and its answer."""
    rng = np.random.default_rng(seed)
    records = [_record(rng) for _ in range(num_records)]
    prose = " ".join(record.sentence for record in records)
    if kind == "json":
        return f"{prose}\nWrite the payments as JSON.\n", json.dumps([asdict(r) for r in records])
    if kind == "table":
        return f"{prose}\nWrite the payments as a table.\n", _table(records)
    first = _listing(records)
    prompt = f"{prose}\nWho paid, and how much?\n{first}\nAnd who of them was born before 1970?\n"
    return prompt, _second_answer(records)


def _record(rng: np.random.Generator) -> Record:
    return Record(
        name=f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}",
        town=str(rng.choice(TOWNS)),
        born=f"{rng.integers(1940, 2005)}-{rng.integers(1, 13):02}-{rng.integers(1, 29):02}",
        amount=f"{rng.integers(10, 9999)}.{rng.integers(0, 100):02}",
    )


def _table(records: list[Record]) -> str:
    rows = [f"| {one.name} | {one.town} | {one.born} | {one.amount} |" for one in records]
    return "\n".join(["| name | town | born | amount |", "|---|---|---|---|", *rows])


def _listing(records: list[Record]) -> str:
    return "\n".join(f"- {one.name} paid {one.amount} euros." for one in records)


def _second_answer(records: list[Record]) -> str:
    old = [one for one in records if one.born < "1970"]
    lines = [f"- {one.name} paid {one.amount} euros, and was born on {one.born}." for one in old]
    return "\n".join([f"Of these {len(records)} people {len(old)} were:", *lines, "No others."])
