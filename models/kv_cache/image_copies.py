"""Copies whole images between the image pool and host memory, as bytes.

Owns the order of the bytes: for each cross-attention layer its keys, then its values, tile after
tile; in int8 the codes, then the scales. On a GPU copies out run on a stream of their own, beside
the next steps, into pinned memory. What writes to the image pool waits for them on the device
(unverified on a GPU).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attention.int8_states import Int8States, States
from ..batch import StepBatch
from .paged_cache import KVPools

logger = logging.getLogger(__name__)

# Waits for the copy of an image's blocks, and returns it; called from any thread.
HostCopy = Callable[[], memoryview]


class ImageCopies:
    """Copies images of these pools; used by the step's thread alone."""

    def __init__(self, pools: KVPools) -> None:
        layers = [pools.layers[index] for index in sorted(pools.cross_layers)]
        states = [one for layer in layers for one in (layer.keys, layer.values)]
        self._parts = [part for one in states for part in _tensors(one)]
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        return sum(part[0].nbytes for part in self._parts if len(part))

    def before_step(self, batch: StepBatch) -> None:
        """Put the images that a step loads into their blocks."""
        if batch.loads or batch.images:
            for device, stream in self._streams.items():
                torch.cuda.current_stream(device).wait_stream(stream)
        for block_ids, data in batch.loads.items():
            self._load(np.frombuffer(data, dtype=np.uint8), block_ids)

    def after_step(self, batch: StepBatch) -> dict[str, HostCopy]:
        """Start copies of the images that the step has encoded and that are to be kept."""
        kept = {}
        for image in batch.finished_images:
            if image.keep_as:
                try:
                    kept[image.keep_as] = self._start(image.block_ids)
                except (RuntimeError, MemoryError) as error:
                    logger.warning("an image is not kept in host memory: %s", error)
        return kept

    def _start(self, block_ids: Sequence[int]) -> HostCopy:
        is_pinned = any(part.is_cuda for part in self._parts)
        num_bytes = len(block_ids) * self.tile_bytes
        buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        events = []
        for device in {part.device for part in self._parts if part.is_cuda}:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))
        for part, rows in self._sections(buffer, len(block_ids)):
            for row, block_id in zip(rows, block_ids, strict=True):
                source = part[block_id].reshape(-1).view(torch.uint8)
                if not part.is_cuda:
                    row.copy_(source)
                    continue
                with torch.cuda.stream(self._streams[part.device]):
                    row.copy_(source, non_blocking=True)
        for stream in self._streams.values():
            events.append(stream.record_event())

        def data() -> memoryview:
            for event in events:
                event.synchronize()
            return buffer.numpy().data

        return data

    def _load(self, data: NDArray[np.uint8], block_ids: Sequence[int]) -> None:
        for part, rows in self._sections(torch.from_numpy(data), len(block_ids)):
            for row, block_id in zip(rows, block_ids, strict=True):
                part[block_id].view(-1).view(torch.uint8).copy_(row)

    def _sections(self, data: Tensor, num_tiles: int) -> list[tuple[Tensor, Tensor]]:
        """Each part of the pool, and its bytes in `data`: [num_tiles, bytes of a tile]."""
        sizes = [num_tiles * part[0].nbytes for part in self._parts]
        sections = data.split(sizes)
        return [
            (part, section.view(num_tiles, -1))
            for part, section in zip(self._parts, sections, strict=True)
        ]


def _tensors(states: States) -> list[Tensor]:
    return [states.codes, states.scales] if isinstance(states, Int8States) else [states]
