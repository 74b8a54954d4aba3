from __future__ import annotations

from pathlib import Path

import pytest
from support.adapters import MIXED
from support.oracle import oracle

from vlmserve.models.batch import AdapterRef

LAYOUT = "tiny"


@pytest.fixture(autouse=True)
def in_one_thread(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="session")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterRef]:
    """The folders of all MIXED adapters, by name."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    return {name: one.write(folder / name, oracle(LAYOUT), name) for name, one in MIXED.items()}
