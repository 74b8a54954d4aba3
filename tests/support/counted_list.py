"""A list that counts how many of its elements are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np


class CountedList(list[int]):
    """num_read: by index, by slice, by iteration, and as an array."""

    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.num_read += len(self)
        return super().__iter__()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        self.num_read += len(self)
        return np.array(list(super().__iter__()), dtype=dtype)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise TypeError("a counted list is not copied")
