from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.adapters import MIXED
from support.oracle import oracle

from vlmserve.models.batch import AdapterRef

LAYOUT = "tiny"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterRef]:
    """The folders of all MIXED adapters, by name."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    return {name: one.write(folder / name, oracle(LAYOUT), name) for name, one in MIXED.items()}
