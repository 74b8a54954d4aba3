"""Keeps most of what Triton's interpreter computes out of the tests of every run.

It takes seconds where a kernel takes microseconds; `make test-slow` runs all of it.
"""

import pytest

NUM_SAMPLES = 3
LONG = ("chunks over many blocks", "test_many_decodes_in_bfloat16")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_interpreted = "test_attention.py" in item.nodeid and "triton-interpreter" in item.name
        if is_interpreted and is_long(item):
            item.add_marker(pytest.mark.slow)


def is_long(item: pytest.Item) -> bool:
    seed = item.callspec.params.get("seed", 0) if isinstance(item, pytest.Function) else 0
    return seed >= NUM_SAMPLES or any(word in item.name for word in LONG)
