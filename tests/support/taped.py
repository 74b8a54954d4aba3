"""A recorder of graphs on a CPU, as strict as CUDA's: the same operations on the same memory.

While it records it keeps every operation of torch and every launch of a kernel with the arguments
they had. A replay does those again: Python's code does not run, so a number that it computed, or a
tensor that it made, stays what it was. What capture forbids raises here too: reading a value back,
results whose shape depends on values, and tensors made of Python's numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmserve.models.attention.base import AttentionBackend, PagedRows
from vlmserve.models.attention.sdpa import SdpaBackend
from vlmserve.models.attention.triton_paged import TritonBackend, TritonPlan
from vlmserve.models.decoder import kernel_launch
from vlmserve.models.execution.graphs.recorder import Computation, Recorder

FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::lift_fresh",
    "aten::_unique2",
}

Entry = Callable[[], object]
# triton's interpreter keeps a program's place in a global: one thread at a time
INTERPRETER = threading.Lock()


class TapeRecorder(Recorder):
    """Records torch's operations, and launches of the kernels of `taped_backend`."""

    def __init__(self) -> None:
        self.tape: list[Entry] | None = None
        self.is_launching = False

    def record(self, compute: Computation) -> Computation:
        """See `Recorder.record`."""
        tape: list[Entry] = []
        self.tape = tape
        try:
            with _TapeMode(self):
                output = compute()
        finally:
            self.tape = None
        assert tape, "nothing was recorded"

        def replay() -> Tensor:
            for entry in tape:
                entry()
            return output

        return replay

    def taped(self, kernels: ModuleType) -> Any:
        """The kernels of a module, with their launches on the tape."""
        names = [name for name in vars(kernels) if name.endswith("_kernel")]
        return SimpleNamespace(**{n: _TapedKernel(getattr(kernels, n), self) for n in names})


class _TapedKernel:
    def __init__(self, kernel: Any, recorder: TapeRecorder) -> None:
        self._kernel, self._recorder = kernel, recorder

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            def again() -> None:
                with INTERPRETER:
                    self._kernel[grid](*args, **kwargs)

            self._recorder.is_launching = True
            again()
            self._recorder.is_launching = False
            if self._recorder.tape is not None:
                self._recorder.tape.append(again)

        return launch


class _TapeMode(TorchDispatchMode):
    """Puts every operation but those of a kernel's interpreter on the tape."""

    def __init__(self, recorder: TapeRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._recorder.is_launching:
            return result
        name = func._schema.name
        assert name not in FORBIDDEN, f"{name} cannot be captured"
        assert self._recorder.tape is not None
        entry = _again(func, args, kwargs, result)
        if entry is not None:
            self._recorder.tape.append(entry)
        return result


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Entry | None:
    """Runs an operation once more, into the memory that its result has.

    None for a view: it shows the same memory in a replay.
    """
    given = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
    made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
    if all(_memory(one) in given for one in made):
        return (lambda: func(*args, **kwargs)) if func._schema.is_mutable else None
    if isinstance(result, Tensor):
        return lambda: result.copy_(func(*args, **kwargs))

    def again() -> None:
        fresh = [one for one in tree_leaves(func(*args, **kwargs)) if isinstance(one, Tensor)]
        for target, source in zip(made, fresh, strict=True):
            target.copy_(source)

    return again


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class TapedGroup:
    """A rank's group whose sums the recorder keeps: a replay adds up again, as NCCL's does."""

    def __init__(self, group: Any, recorder: TapeRecorder) -> None:
        self._group, self._recorder = group, recorder
        self.rank, self.size = group.rank, group.size
        self.join, self.least = group.join, group.least

    def add_up(self, states: Tensor) -> Tensor:
        """See `Group.add_up`."""
        self._recorder.is_launching = True
        try:
            total = self._group.add_up(states)
        finally:
            self._recorder.is_launching = False
        if self._recorder.tape is not None:
            self._recorder.tape.append(lambda: total.copy_(self._group.add_up(states)))
        return total


def taped_backend(recorder: TapeRecorder, piece: int | None = None) -> TritonBackend:
    """A Triton backend whose launches the recorder keeps."""
    backend = TritonBackend(piece)
    backend._kernels = recorder.taped(backend._kernels)
    return backend


def tape_operations(recorder: TapeRecorder, monkeypatch: Any) -> None:
    """Let the kernels between the products be kept too."""
    monkeypatch.setattr(kernel_launch, "fused_kernels", recorder.taped(kernel_launch.fused_kernels))


class TapedTorchBackend(TritonBackend):
    """Attention of recorded steps by torch's operations alone, which a tape replays fast.

    Other steps use `SdpaBackend`. Triton's interpreter takes seconds for what takes milliseconds
    here; test_decode_graphs.py compares its kernels.
    """

    lists = AttentionBackend.lists

    def prepare(self, rows: PagedRows, device: torch.device, dtype: torch.dtype) -> Any:
        """See `AttentionBackend.prepare`."""
        return SdpaBackend().prepare(rows, device, dtype)

    def attend(
        self, query: Tensor, key_cache: Any, value_cache: Any, plan: Any, scale: float
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        if not isinstance(plan, TritonPlan):
            return SdpaBackend().attend(query, key_cache, value_cache, plan, scale)
        table, num_rows = plan.block_table.reshape(-1), len(plan.key_lens)
        stride = plan.launches[0].items.sizes[1]
        firsts = torch.arange(num_rows)[:, None] * stride
        places = (firsts + torch.arange(table.numel() // num_rows)).clamp(max=table.numel() - 1)
        # behind a row's own ids there may be anything of other steps
        ids = table[places].clamp(0, len(key_cache) - 1)
        group = query.shape[1] // key_cache.shape[-2]
        keys, values = (
            cache[ids].flatten(1, 2).transpose(1, 2).repeat_interleave(group, dim=1)
            for cache in (key_cache, value_cache)
        )
        is_key = (torch.arange(keys.shape[2]) < plan.key_lens[:, None])[:, None]
        scores = (keys * query[:, :, None]).sum(dim=-1) * scale
        weights = scores.masked_fill(~is_key, -torch.inf).softmax(dim=-1)
        # rows without keys, and blocks whose contents do not count, may be NaN
        weights = weights.masked_fill(~is_key, 0.0)
        return (weights[..., None] * values.masked_fill(~is_key[..., None], 0.0)).sum(dim=2)

    def write(
        self, keys: Tensor, values: Tensor, key_cache: Any, value_cache: Any, slots: Tensor
    ) -> None:
        """See `AttentionBackend.write`; rows without a slot write what the first row writes."""
        is_row = (slots >= 0)[:, None, None]
        places = torch.where(slots >= 0, slots, slots[:1]).clamp(min=0).long()
        for states, cache in ((keys, key_cache), (values, value_cache)):
            flat = cache.view(-1, *cache.shape[2:])
            first = torch.where(is_row[:1], states[:1], flat[places[:1]])
            flat.index_copy_(0, places, torch.where(is_row, states, first))
