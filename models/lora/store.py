"""The adapters of a runner: reads them, keeps them in host memory, puts a step's into slots.

`read` and `forget` may be called from any thread, `place` by the thread that runs the steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..batch import AdapterInfo, AdapterRef, ImageToEncode, ScheduledSequence, StepBatch
from ..decoder.operations import LayerOperations
from ..errors import StepError
from ..weights.loader import LoadedModel
from .adapted import AdaptedOperations, DeviceRows, Rows, SameRows, has_kernels, hooked, launch_once
from .limits import AdapterLimits
from .reader import HostAdapter, ReadLimits, read_adapter
from .rows import NO_SLOT, WholeRows
from .sites import Site, sites_of
from .slots import SiteSlots, Slots


class AdapterStore:
    """The adapters that a runner has read, and those in its slots."""

    def __init__(self, loaded: LoadedModel, limits: AdapterLimits) -> None:
        """Allocate the slots on the devices of the model's layers."""
        self.limits = limits
        self._sites = sites_of(loaded)
        self._read_limits = ReadLimits(limits.max_rank, limits.dtype, loaded.share)
        self._slots = Slots(self._sites, limits.max_loras, limits.max_rank, limits.dtype)
        self._num_patches = loaded.num_patches
        self._by_target: Mapping[nn.Module, tuple[Site, SiteSlots]] = {
            site.target: (site, slots) for site, slots in self._slots.by_site.items()
        }
        for device in {site.device for site in self._sites}:
            has_kernels(device, limits.dtype)  # tried now, not in the first step that has adapters
        self._hosts: dict[str, HostAdapter] = {}
        self._reading = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Device memory of the slots."""
        return self._slots.num_bytes

    @property
    def num_loads(self) -> int:
        """How often an adapter was put into a slot."""
        return self._slots.num_loads

    @property
    def in_slots(self) -> list[str]:
        """The digests of the adapters in slots, the least recently used first."""
        return self._slots.digests

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels that a GPU uses for several adapters. dtype: the model's."""
        decoder = [one for one in self._by_target.values() if not one[0].is_of_vision]
        launch_once(decoder, self.limits.max_loras, dtype)

    def can_record(self, device: torch.device) -> bool:
        """Whether recorded steps can have adapters: by the kernels alone."""
        return has_kernels(device, self.limits.dtype)

    def recorded_operations(
        self, inner: LayerOperations, order: Tensor, starts: Tensor
    ) -> LayerOperations:
        """A decoder's operations that read each step's rows from fixed memory; see `sorted_rows`.

        order: int32 [most rows]; starts: int32 [max_loras + 1].
        """
        from .kernel_rows import RecordedRows

        rows = SameRows(RecordedRows(order, starts))
        return AdaptedOperations(inner, self._by_target, rows, None)

    def read(self, ref: AdapterRef) -> AdapterInfo:
        """Read an adapter's files, check them, and keep the weights in host memory.

        Does nothing for a digest that is there. Raises AdapterError, one line that names the file,
        field or tensor.
        """
        with self._reading:  # one at a time: a file may be as large as memory has room for
            found = self._hosts.get(ref.digest)
            if found is None:
                found = read_adapter(ref, self._sites, self._read_limits)
                self._hosts[ref.digest] = found
        return found.info

    def forget(self, digest: str) -> None:
        """Free an adapter's host memory; its slot is the next to be taken. It may be read again."""
        with self._reading:
            self._hosts.pop(digest, None)

    def in_order(self, batch: StepBatch) -> StepBatch:
        """The step with its sequences in the order of their slots, as torch changes them fastest.

        The same step if it has one adapter at most for all.
        """
        if len({one.adapter for one in batch.sequences}) < 2:
            return batch

        def place_of(one: ScheduledSequence) -> tuple[int, str]:
            slot = self._slots.slot_of(one.adapter)
            return self.limits.max_loras if slot is None else slot, one.adapter

        return replace(batch, sequences=sorted(batch.sequences, key=place_of))

    def place(self, batch: StepBatch) -> StepAdapters | None:
        """Put the adapters of a step into slots; None if it uses none.

        Raises StepError if the step has more adapters than there are slots, or an adapter that was
        not read. Nothing has changed then.
        """
        digests = sorted(batch.adapters)
        if not digests:
            return None
        if len(digests) > self.limits.max_loras:
            raise StepError(
                f"a step has {len(digests)} adapters; max_loras is {self.limits.max_loras}"
            )
        missing = {d: self._hosts.get(d) for d in digests if self._slots.slot_of(d) is None}
        for digest, adapter in missing.items():
            if adapter is None:
                raise StepError(f"the adapter {digest[:12]} has not been read")
        for digest in [one for one in self.in_slots if one not in self._hosts]:
            self._slots.drop(digest)
        self._slots.touch(digests)
        for digest, adapter in missing.items():
            self._slots.load(digest, cast(HostAdapter, adapter))
        return StepAdapters(self._by_target, self._slot_of, self.limits, batch, self._num_patches)

    def _slot_of(self, digest: str) -> int:
        found = self._slots.slot_of(digest) if digest else NO_SLOT
        assert found is not None, "every adapter of a step is in a slot"
        return found


class StepAdapters:
    """The adapters of one step, in their slots."""

    def __init__(
        self,
        sites: Mapping[nn.Module, tuple[Site, SiteSlots]],
        slot_of: Callable[[str], int],
        limits: AdapterLimits,
        batch: StepBatch,
        num_patches: int,
    ) -> None:
        self._sites, self._slot_of = sites, slot_of
        self._rows = _rows(
            [slot_of(one.adapter) for one in batch.sequences],
            [len(one.token_ids) for one in batch.sequences],
            limits,
        )
        finished = batch.finished_images
        self._image_rows = _rows(
            [slot_of(one.adapter) for one in finished],
            [one.image.num_tiles * num_patches for one in finished],
            limits,
        )

    @property
    def row_slots(self) -> NDArray[np.int64] | None:
        """The slot of each token, NO_SLOT without an adapter; None if no token has one."""
        return None if self._rows is None else self._rows.slots

    def operations(self, inner: LayerOperations) -> LayerOperations:
        """The decoder's operations with these adapters."""
        return AdaptedOperations(inner, self._sites, self._rows, self._image_rows)

    def decoding(self) -> AbstractContextManager[None]:
        """Lets the adapters change a decoder of transformers' modules, within the context."""
        decoder = [one for one in self._sites.values() if not one[0].is_of_vision]
        return hooked(decoder, self._rows_of)

    def _rows_of(self, site: Site) -> Rows | None:
        rows = self._image_rows if site.reads_images else self._rows
        return None if rows is None else rows.on(site.device)

    def encoding(self, image: ImageToEncode) -> AbstractContextManager[None]:
        """Lets the image's adapter change the vision model, within the context.

        All images of the pass have the same adapter.
        """
        slot = self._slot_of(image.adapter)
        if slot == NO_SLOT:
            return nullcontext()
        rows = WholeRows(slot)
        vision = [one for one in self._sites.values() if one[0].is_of_vision]
        return hooked(vision, lambda site: rows)


def _rows(slots: Sequence[int], counts: Sequence[int], limits: AdapterLimits) -> DeviceRows | None:
    """So many rows of each slot; None if no row has an adapter."""
    if all(slot == NO_SLOT for slot in slots):
        return None
    rows = np.repeat(np.array(slots, dtype=np.int64), counts)
    return DeviceRows(rows, limits.max_loras, limits.dtype)
