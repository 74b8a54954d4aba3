"""Applies a step's adapters: in the decoder's products, and in modules by hooks.

Owns which rows a site changes. The base weights are never touched: an adapter's change is added to
the product, whatever the weights' form, and on each rank before the ranks are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..attention import AttentionBackend
from ..decoder.linear_products import Change, LinearProduct
from ..decoder.operations import Activation, Heads, LayerOperations, Rotation, Stream
from ..kernels.self_test import are_usable
from ..kv_cache.paged_cache import LayerCache
from .rows import AdapterRows
from .sites import Site
from .slots import SiteSlots


class Rows(Protocol):
    """Rows of products, some of which use an adapter."""

    def changes(self, site: SiteSlots) -> bool: ...
    def change(self, result: Tensor, states: Tensor, site: SiteSlots) -> None: ...


class PlacedRows(Protocol):
    """The rows of a step on the devices of its sites."""

    def on(self, device: torch.device) -> Rows: ...


class SameRows:
    """Rows that are laid out already, on the only device."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def on(self, device: torch.device) -> Rows:
        """The rows."""
        return self._rows


class DeviceRows:
    """The rows of a step on each device that has sites, laid out when they are first used there."""

    def __init__(self, slots: NDArray[np.int64], max_loras: int, dtype: torch.dtype) -> None:
        """slots: of each row, NO_SLOT without an adapter; at least one row has an adapter.

        dtype: of the slots.
        """
        self.slots, self._max_loras, self._dtype = slots, max_loras, dtype
        self._on: dict[torch.device, Rows] = {}

    def on(self, device: torch.device) -> Rows:
        """The rows on one device: by the kernels for several adapters on a GPU, else by torch."""
        if device not in self._on:
            self._on[device] = self._laid_out(device)
        return self._on[device]

    def _laid_out(self, device: torch.device) -> Rows:
        is_one = len(np.unique(self.slots)) == 1
        if is_one or not has_kernels(device, self._dtype):
            return AdapterRows(self.slots, device)
        from .kernel_rows import KernelRows

        return KernelRows(self.slots, self._max_loras, device)


@functools.cache
def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on a device and are right; they are tried once, at the start.

    Not in float32, whose products take no tensor cores.
    """
    if dtype == torch.float32:
        return False

    def trial() -> list[tuple[Tensor, Tensor]]:
        from .kernel_rows import trial_pairs

        return trial_pairs(device, dtype)

    return are_usable("products of adapters", device, trial)


def launch_once(
    sites: Iterable[tuple[Site, SiteSlots]], max_loras: int, dtype: torch.dtype
) -> None:
    """Launch the kernels for each size of a site, so that no request waits for a compiler.

    dtype: of the states. The slots are empty: nothing is computed. Nothing on a CPU.
    """
    seen = set()
    for site, slots in sites:
        key = (site.device, slots.a.shape, slots.b.shape, slots.begins)
        if key in seen or not has_kernels(site.device, slots.a.dtype):
            continue
        seen.add(key)
        from .kernel_rows import KernelRows

        states, result = (
            torch.zeros(2, width, dtype=dtype, device=site.device)
            for width in (site.num_in, site.num_out)
        )
        rows = KernelRows(np.array([0, max_loras - 1]), max_loras, site.device)
        rows.change(result, states, slots)


class AdaptedOperations(LayerOperations):
    """A decoder's operations, whose products are changed by the adapters of one step."""

    def __init__(
        self,
        inner: LayerOperations,
        sites: Mapping[nn.Module, tuple[Site, SiteSlots]],
        rows: PlacedRows | None,
        image_rows: PlacedRows | None,
    ) -> None:
        """sites: by their targets. rows: of tokens; image_rows: of vision states."""
        self._inner, self._sites = inner, sites
        self._rows, self._image_rows = rows, image_rows

    def product(self, product: LinearProduct, states: Tensor) -> Tensor:
        """See `LayerOperations.product`; the step's adapters change it."""
        change = self._change_of(product)
        return product(states) if change is None else product.changed(states, change)

    def add(self, stream: Stream, product: LinearProduct, states: Tensor) -> None:
        """See `LayerOperations.add`."""
        change = self._change_of(product)
        if change is None:
            return self._inner.add(stream, product, states)
        self._inner.add_changed(stream, product, states, change)

    def add_gated(
        self,
        stream: Stream,
        product: LinearProduct,
        states: Tensor,
        gate: Tensor,
        row_mask: Tensor | None = None,
    ) -> None:
        """See `LayerOperations.add_gated`."""
        self._inner.add_update(stream, self.product(product, states), gate, row_mask)

    def norm(self, stream: Stream, weight: Tensor, eps: float) -> Tensor:
        """See `LayerOperations.norm`."""
        return self._inner.norm(stream, weight, eps)

    def rotate_and_write(
        self,
        joined: Tensor,
        heads: Heads,
        rotation: Rotation,
        cache: LayerCache,
        slots: Tensor,
        backend: AttentionBackend,
    ) -> Tensor:
        """See `LayerOperations.rotate_and_write`."""
        return self._inner.rotate_and_write(joined, heads, rotation, cache, slots, backend)

    def gated(self, joined: Tensor, activation: Activation) -> Tensor:
        """See `LayerOperations.gated`."""
        return self._inner.gated(joined, activation)

    def _change_of(self, product: LinearProduct) -> Change | None:
        """What the adapters add to a product; None if no adapter of the step changes it."""
        site, slots = self._sites[product]
        found = self._image_rows if site.reads_images else self._rows
        if found is None:
            return None
        rows = found.on(site.device)
        return partial(rows.change, site=slots) if rows.changes(slots) else None


@contextmanager
def hooked(
    sites: Iterable[tuple[Site, SiteSlots]], rows_of: Callable[[Site], Rows | None]
) -> Iterator[None]:
    """Let the adapters of rows change the sites' modules, within the context.

    For modules that the decoder does not join: the vision model, and layers of transformers.
    """
    with ExitStack() as stack:
        for site, slots in sites:
            rows = rows_of(site)
            if rows is not None and rows.changes(slots):
                hook = partial(_change_output, rows, slots)
                stack.callback(site.target.register_forward_hook(hook).remove)
        yield


def _change_output(
    rows: Rows, slots: SiteSlots, module: nn.Module, inputs: Any, output: Tensor
) -> None:
    """Add the adapters' change to a module's output, [..., out], in place."""
    states: Tensor = inputs[0]
    rows.change(output.view(-1, output.shape[-1]), states.reshape(-1, states.shape[-1]), slots)
