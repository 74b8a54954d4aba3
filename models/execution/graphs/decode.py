"""The recorded decode steps of a model: their sizes, the choice for a step, its replay.

Owns the padded sizes, the two variants, and the buffer that replays read.

    sizes       1, 2, 4, 8, 16, 24 ... rows; a step uses the next size that fits
    variants    text only, without the cross-attention layers; or some rows see images

Steps of one token a row are replayed. A chunk of a prompt, a new image or a longer table runs
eager.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.triton_paged import TritonBackend
from ...decoder.decoder import FusedDecoder, LayerCount
from ...kv_cache.paged_cache import KVPools, PagedStep
from ...kv_cache.step_inputs import StepInputs
from .layout import Ints, Layout, Parts, write
from .recorder import Recorder, frozen_objects

# rows of the largest graph: a larger step takes longer to compute than to launch
MAX_ROWS = 256
# ids of a text table, 512 KiB; every replay copies it to the device
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

    host: where its inputs are written; num_entries: their length in the buffer. num_layers: how
    many layers it starts. step: kept alive, since replays read its tensors.
    """

    host: Parts[Ints]
    num_entries: int
    replay: Callable[[], Tensor]
    num_layers: int
    step: PagedStep


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
    ) -> None:
        """layers: the model's layer count, which a replay advances like a normal pass."""
        self._decoder, self._pools, self._backend = decoder, pools, backend
        self._limits, self._layers = limits, layers
        keys = pools.layers[0].keys
        self._dtype = keys.dtype
        self._layouts = [_layout(size, limits) for size in padded_sizes(limits.max_num_seqs)]
        self._buffer = _Buffer(max(lay.num_entries(True) for lay in self._layouts), keys.device)
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self.num_replays = 0
        variants = (True, False) if pools.cross_layers else (False,)
        with frozen_objects():
            for layout in reversed(self._layouts):
                for has_images in variants:
                    graph = self._record(layout, has_images, recorder)
                    self._graphs[layout.size, has_images] = graph

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def most_rows(self) -> int:
        return self._layouts[-1].size

    def takes(self, inputs: StepInputs) -> bool:
        """Whether there is a graph for the step; its images must be encoded already."""
        return self._find(inputs) is not None

    def replay(self, inputs: StepInputs) -> Tensor:
        """The normalised hidden states, [num_rows, hidden]; valid until the next replay."""
        graph = self._find(inputs)
        assert graph is not None, "the step has no graph"
        self._buffer.wait()
        write(graph.host, inputs)
        self._buffer.send(graph.num_entries)
        self._layers.num_started += graph.num_layers
        self.num_replays += 1
        return graph.replay()[: len(inputs.token_ids)]

    def _find(self, inputs: StepInputs) -> _Graph | None:
        num_rows = len(inputs.token_ids)
        layout = next((layout for layout in self._layouts if layout.size >= num_rows), None)
        if layout is None or not layout.takes(inputs):
            return None
        return self._graphs[layout.size, inputs.cross_rows is not None]

    def _record(self, layout: Layout, has_images: bool, recorder: Recorder) -> _Graph:
        parts = layout.parts(self._buffer.device)
        self._buffer.clear(layout)
        step = self._step(parts, has_images)
        # the recorder runs several passes; a replay counts the layers of one
        counts: list[int] = []

        def compute() -> Tensor:
            before = self._layers.num_started
            row_mask = parts.row_mask.to(self._dtype)[:, None] if has_images else None
            hidden = self._decoder(
                parts.token_ids, parts.positions, None, row_mask, self._pools, step
            )
            counts.append(self._layers.num_started - before)
            return hidden

        replay = recorder.record(compute)
        host, num_entries = layout.parts(self._buffer.host), layout.num_entries(has_images)
        return _Graph(host, num_entries, replay, counts[-1], step)

    def _step(self, parts: Parts[Tensor], has_images: bool) -> PagedStep:
        limits, num_patches = self._limits, self._pools.num_patches
        plan = self._backend.fixed_plan
        cross = None
        if has_images:
            longest = limits.max_num_tiles * num_patches
            cross = plan(parts.cross_lens, parts.cross_table, num_patches, longest)
        return PagedStep(
            backend=self._backend,
            text_slots=parts.slots,
            image_slots=None,
            text_plan=plan(
                parts.key_lens, parts.text_table, limits.block_size, limits.max_model_len
            ),
            cross_plan=cross,
        )


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

    def clear(self, layout: Layout) -> None:
        """Make all rows of a layout padding."""
        self.device.zero_()
        layout.parts(self.device).slots.fill_(-1)


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The recorded numbers of rows: 1, 2, 4, then multiples of 8 to 64, then of 32."""
    most = min(max_num_seqs, MAX_ROWS)
    sizes = {1, 2, 4, *range(8, 65, 8), *range(96, MAX_ROWS + 1, 32), most}
    return sorted(size for size in sizes if size <= most)


def _layout(size: int, limits: GraphLimits) -> Layout:
    blocks = -(-limits.max_model_len // limits.block_size)
    return Layout(size, min(blocks, MAX_TABLE // size), MAX_IMAGES * limits.max_num_tiles)
