"""The recorded decode steps of a model: their sizes, the choice for a step, its replay.

Owns the padded sizes, the two variants, and the buffer that replays read.

    sizes       1, 2, 4, 8, 16, 24 ... rows; a step uses the next size that fits
    variants    text only, without the cross-attention layers; or some rows see images; each also
                with adapters, if there are any

Steps of one token a row are replayed. A chunk of a prompt, a new image or a longer table runs
eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...attention.triton_paged import TritonBackend
from ...attention.work_items import aligned
from ...decoder.decoder import FusedDecoder, LayerCount
from ...decoder.operations import LayerOperations
from ...kv_cache.paged_cache import KVPools, PagedStep
from ...kv_cache.step_inputs import StepInputs
from ...kv_cache.step_tensors import Hidden
from ...lora.rows import sorted_rows
from ...lora.store import AdapterStore
from .layout import Ints, Layout, Parts, write, write_padding
from .recorder import Recorder, frozen_objects

# rows of the largest graph: a larger step takes longer to compute than to launch
MAX_ROWS = 256
# ids of a text table, 512 KiB; a replay copies those of its longest row times its rows
MAX_TABLE = 1 << 17
# images with the most tiles that fit a row's table
MAX_IMAGES = 8


@dataclass(slots=True, frozen=True)
class GraphLimits:
    """The largest steps to record. max_num_tiles: of one image."""

    max_num_seqs: int
    max_model_len: int
    block_size: int
    max_num_tiles: int


@dataclass(slots=True, frozen=True)
class _Graph:
    """A recorded step.

    host: where its inputs are written; num_fixed: entries of them before the text table. token_ids,
    sampled: parts of them on the device. num_layers: how many layers it starts. step: kept alive,
    since replays read its tensors.
    """

    layout: Layout
    host: Parts[Ints]
    num_fixed: int
    token_ids: Tensor
    sampled: Tensor
    replay: Callable[[], Tensor]
    num_layers: int
    step: PagedStep


@dataclass(slots=True, frozen=True)
class StagedStep:
    """A step's inputs as they will be copied, but for its tokens. sampled: see `Hidden`."""

    graph: _Graph
    entries: Ints
    num_rows: int
    num_sampled: int | None


class DecodeGraphs:
    """Records all graphs when created; `replay` runs a step that `takes` accepts."""

    def __init__(
        self,
        decoder: FusedDecoder,
        pools: KVPools,
        backend: TritonBackend,
        limits: GraphLimits,
        recorder: Recorder,
        layers: LayerCount,
        adapters: AdapterStore | None = None,
    ) -> None:
        """layers: the model's layer count, which a replay advances like a normal pass."""
        self._decoder, self._pools, self._backend = decoder, pools, backend
        self._limits, self._layers = limits, layers
        keys = pools.layers[0].keys
        self._dtype = keys.dtype
        self._layouts = [
            _layout(size, limits, pools.num_patches, backend)
            for size in padded_sizes(limits.max_num_seqs)
        ]
        self._buffer = _Buffer(max(lay.num_entries for lay in self._layouts), keys.device)
        self._adapters = None
        if adapters is not None and adapters.can_record(keys.device):
            self._adapters = _Adapters(adapters, self._layouts[-1].size, keys.device)
        self._graphs: dict[tuple[int, bool, bool], _Graph] = {}
        self.num_replays = 0
        variants = (True, False) if pools.cross_layers else (False,)
        with frozen_objects():
            for layout in reversed(self._layouts):
                for has_images in variants:
                    for has_adapters in (True, False) if self._adapters else (False,):
                        graph = self._record(layout, has_images, has_adapters, recorder)
                        self._graphs[layout.size, has_images, has_adapters] = graph

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def most_rows(self) -> int:
        return self._layouts[-1].size

    def takes(self, inputs: StepInputs, has_adapters: bool = False) -> bool:
        """Whether there is a graph for the step; its images must be encoded already."""
        return self._find(inputs, has_adapters) is not None

    def replay(self, inputs: StepInputs, row_slots: NDArray[np.int64] | None = None) -> Hidden:
        """The normalised hidden states of the rows; valid until the next replay.

        row_slots: of the rows' adapters; None if no row has one.
        """
        graph = self._find(inputs, row_slots is not None)
        assert graph is not None, "the step has no graph"
        if row_slots is not None and self._adapters is not None:
            self._adapters.write(row_slots)
        self._buffer.wait()
        write(graph.layout, graph.host, inputs, self._backend)
        num_entries, num_rows, num_sampled = _sizes_of(graph, inputs)
        self._buffer.send(num_entries)
        return self._replay(graph, num_rows, num_sampled)

    def stage(self, inputs: StepInputs) -> StagedStep | None:
        """Lay out a step without adapters whose tokens are not known; None if it has no graph.

        May be called from another thread than `replay`.
        """
        graph = self._find(inputs, False)
        if graph is None:
            return None
        sizes = _sizes_of(graph, inputs)
        entries = np.zeros(graph.layout.num_entries, dtype=np.int32)
        write(graph.layout, graph.layout.parts(entries), inputs, self._backend)
        return StagedStep(graph, entries[: sizes[0]], *sizes[1:])

    def replay_staged(self, staged: StagedStep, token_ids: Tensor, places: Sequence[int]) -> Hidden:
        """As `replay`, of a staged step whose tokens are on the device; does not wait for them.

        token_ids: int64; a negative one counts as 0. places: the place in it of each row's token.
        """
        graph, num_entries = staged.graph, len(staged.entries)
        self._buffer.wait()
        self._buffer.host[:num_entries] = staged.entries
        graph.host.token_ids[: len(places)] = places
        self._buffer.send(num_entries)
        own = graph.token_ids[: len(places)]
        own.copy_(token_ids.index_select(0, own).clamp_(min=0))
        return self._replay(graph, staged.num_rows, staged.num_sampled)

    def _replay(self, graph: _Graph, num_rows: int, num_sampled: int | None) -> Hidden:
        self._layers.num_started += graph.num_layers
        self.num_replays += 1
        sampled = None if num_sampled is None else graph.sampled[:num_sampled]
        return Hidden(graph.replay()[:num_rows], sampled)

    def _find(self, inputs: StepInputs, has_adapters: bool) -> _Graph | None:
        num_rows = len(inputs.token_ids)
        layout = next((layout for layout in self._layouts if layout.size >= num_rows), None)
        if layout is None or not layout.takes(inputs):
            return None
        return self._graphs.get((layout.size, inputs.cross_rows is not None, has_adapters))

    def _record(
        self, layout: Layout, has_images: bool, has_adapters: bool, recorder: Recorder
    ) -> _Graph:
        parts = layout.parts(self._buffer.device)
        self._buffer.wait()
        write_padding(layout, layout.parts(self._buffer.host), self._backend)
        self._buffer.send(layout.num_entries)
        step = self._step(layout, parts, has_images)
        operations = None
        if has_adapters and self._adapters is not None:
            operations = self._adapters.operations(self._decoder, layout.size)
        # the recorder runs several passes; a replay counts the layers of one
        counts: list[int] = []

        def compute() -> Tensor:
            before = self._layers.num_started
            row_mask = parts.row_mask.to(self._dtype)[:, None] if has_images else None
            hidden = self._decoder(
                parts.token_ids, parts.positions, None, row_mask, self._pools, step, operations
            )
            counts.append(self._layers.num_started - before)
            return hidden

        replay = recorder.record(compute)
        host = layout.parts(self._buffer.host)
        return _Graph(
            layout,
            host,
            layout.num_fixed,
            parts.token_ids,
            parts.sampled,
            replay,
            counts[-1],
            step,
        )

    def _step(self, layout: Layout, parts: Parts[Tensor], has_images: bool) -> PagedStep:
        plan = self._backend.fixed_plan
        cross = None
        if has_images:
            cross = plan(
                parts.cross_lens,
                parts.cross_table,
                self._pools.num_patches,
                layout.cross_work.views(parts.cross_work),
            )
        return PagedStep(
            backend=self._backend,
            text_slots=parts.slots,
            image_slots=None,
            text_plan=plan(
                parts.key_lens,
                parts.text_table,
                self._limits.block_size,
                layout.text_work.views(parts.text_work),
            ),
            cross_plan=cross,
        )


class _Adapters:
    """Which rows use which adapter, in memory that all graphs with adapters read.

    starts | order
    """

    def __init__(self, store: AdapterStore, most_rows: int, device: torch.device) -> None:
        self._store, self._max_loras = store, store.limits.max_loras
        self._begin = aligned(self._max_loras + 1)
        self._buffer = _Buffer(self._begin + most_rows, device)

    def operations(self, decoder: FusedDecoder, num_rows: int) -> LayerOperations:
        """The decoder's operations for a graph of that many rows."""
        device = self._buffer.device
        starts, order = device[: self._max_loras + 1], device[self._begin :][:num_rows]
        return self._store.recorded_operations(decoder.operations, order, starts)

    def write(self, row_slots: NDArray[np.int64]) -> None:
        """Write a step's rows; a graph's further rows have no adapter."""
        order, starts = sorted_rows(row_slots, self._max_loras)
        self._buffer.wait()
        self._buffer.host[: len(starts)] = starts
        self._buffer.host[self._begin :][: len(order)] = order
        self._buffer.send(self._begin + len(order))


class _Buffer:
    """A buffer on the host, pinned for a GPU, and its copy on the device."""

    def __init__(self, num_entries: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(num_entries, dtype=torch.int32, pin_memory=is_cuda)
        self.host = self._host.numpy()
        self.device = torch.zeros(num_entries, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if is_cuda else None

    def send(self, num_entries: int) -> None:
        """Copy the first entries to the device, without waiting."""
        self.device[:num_entries].copy_(self._host[:num_entries], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device.device))

    def wait(self) -> None:
        """Wait until the last copy is done and the host's side may be written."""
        if self._copied is not None:
            self._copied.synchronize()


def _sizes_of(graph: _Graph, inputs: StepInputs) -> tuple[int, int, int | None]:
    """Entries that a step uses, its rows, and its sampled rows unless these are all."""
    num_rows, width = inputs.text_rows.block_table.shape
    num_sampled = None if inputs.sampled_places is None else len(inputs.sampled)
    return graph.num_fixed + num_rows * width, num_rows, num_sampled


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The recorded numbers of rows: 1, 2, 4, then multiples of 8 to 64, then of 32."""
    most = min(max_num_seqs, MAX_ROWS)
    sizes = {1, 2, 4, *range(8, 65, 8), *range(96, MAX_ROWS + 1, 32), most}
    return sorted(size for size in sizes if size <= most)


def _layout(size: int, limits: GraphLimits, num_patches: int, backend: TritonBackend) -> Layout:
    blocks = -(-limits.max_model_len // limits.block_size)
    text_width, cross_width = min(blocks, MAX_TABLE // size), MAX_IMAGES * limits.max_num_tiles
    return Layout(
        size,
        text_width,
        cross_width,
        backend.work_layout(size, text_width * limits.block_size),
        backend.work_layout(size, cross_width * num_patches),
    )
