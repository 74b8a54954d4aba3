"""Counts on a CPU what would make a GPU's step wait, or its host.

Sees the calls that read values back, results whose shape depends on values, indexing by bools, and
copies to a device of anything that was not pinned. `models/device_copies.py` is the way that is
allowed: its copies down are counted apart.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmserve.models import device_copies

READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "__contains__",
    "__iter__",
    "is_nonzero",
    "equal",
    "allclose",
}
# of the dispatcher: also what torch's own functions call within
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}


@dataclass
class Waits:
    """What was seen: names of calls, and how many copies down `transfer` made."""

    others: Counter[str] = field(default_factory=Counter)
    num_fetches: int = 0
    num_uploads: int = 0
    is_allowed: bool = False
    resident: set[int] = field(default_factory=set)


@contextlib.contextmanager
def counted(monkeypatch: Any, model: nn.Module | None = None) -> Iterator[Waits]:
    """Count in this thread while the context lasts; the model's own tensors lie on the device."""
    waits = Waits()
    resident = [] if model is None else [*model.parameters(), *model.buffers()]
    waits.resident = {_memory(tensor) for tensor in resident}
    to_host, to_device = device_copies._to_host, device_copies._to_device

    def fetching(tensor: Tensor) -> Any:
        waits.num_fetches += 1
        return allowed(to_host, tensor)

    def uploading(host: Tensor, device: torch.device) -> Tensor:
        waits.num_uploads += 1
        result: Tensor = allowed(to_device, host, device)
        return result

    def allowed(function: Any, *args: Any) -> Any:
        waits.is_allowed = True
        try:
            return function(*args)
        finally:
            waits.is_allowed = False

    monkeypatch.setattr(device_copies, "_to_host", fetching)
    monkeypatch.setattr(device_copies, "_to_device", uploading)
    with _Calls(waits), _Operations(waits):
        yield waits


class _Calls(TorchFunctionMode):
    """Calls from Python."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if not self._waits.is_allowed and (name in READS or self._crosses(func, args, kwargs)):
            self._waits.others[name] += 1
        return func(*args, **kwargs)

    def _crosses(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call makes a tensor of Python's numbers, or moves one to a device."""
        if func in MAKERS:
            return True
        if func not in (Tensor.to, Tensor.cuda) or _memory(args[0]) in self._waits.resident:
            return False
        return any(isinstance(one, (torch.device, str)) for one in tree_leaves((args, kwargs)))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Operations(TorchDispatchMode):
    """Operations, wherever they are called from."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        full = f"{name}.{func._schema.overload_name}"
        if not self._waits.is_allowed and ({name, full} & WAITING or _by_bools(name, args)):
            self._waits.others[name] += 1
        return func(*args, **(kwargs or {}))


def _by_bools(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an index holds bools, whose places must be counted first."""
    if name not in INDEXING:
        return False
    places = [one for one in tree_leaves(args[1]) if isinstance(one, Tensor)]
    return any(one.dtype in (torch.bool, torch.uint8) for one in places)
