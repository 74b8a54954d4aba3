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

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmserve.models.attention.triton_paged import TritonBackend
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

Entry = Callable[[], None]
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
        self._recorder.tape.append(_again(func, args, kwargs, result))
        return result


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Entry:
    """Runs an operation once more, into the memory that its result has."""
    given = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
    made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
    own = [one for one in made if _memory(one) not in given]

    def again() -> None:
        fresh = [one for one in tree_leaves(func(*args, **kwargs)) if isinstance(one, Tensor)]
        if own:
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
