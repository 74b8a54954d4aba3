"""Times the decoder's products alone, in plain and in int8 weights, against the copy bandwidth.

Owns the shapes, the copies that keep a weight out of the GPU's cache, and the tilings that a sweep
tries. Knows nothing of steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.decoder.int8.product import TILES, Tiles, fused_product
from vlmserve.models.decoder.int8.quantizer import Int8Weight, quantize
from vlmserve.models.execution.runner import ModelRunner

from .clock import Clock
from .plan import INT8, Row, Size

# weights that are read between two reads of one: several times a GPU's cache
ROTATED_BYTES = 1 << 28
REPLAYS = 5
SWEPT = (
    TILES,
    Tiles(block_n=16, block_k=256, num_stages=4),
    Tiles(block_n=32, block_k=256, num_stages=4),
    Tiles(block_n=64, block_k=128, num_stages=4),
    Tiles(block_n=64, block_k=256, num_warps=8),
    Tiles(block_n=128, block_k=128, num_warps=8, num_stages=4),
    Tiles(num_programs=528),
)

Product = Callable[[Tensor], Tensor]


def products(runner: ModelRunner, row: Row, size: Size, bytes_per_s: float) -> dict[str, Any]:
    """Microseconds of each product at one row and at the most, and its share of the bandwidth."""
    timed = _Timed(torch.device(size.device), getattr(torch, size.dtype), size, bytes_per_s)
    shapes = shapes_of(runner.config.text_config)
    if row.quantize == INT8:
        del shapes["head"]
    return {
        "products": [
            entry
            for name, (num_in, num_out) in shapes.items()
            for entry in timed.entries(name, num_in, num_out, row.quantize == INT8)
        ]
    }


def shapes_of(config: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a self-attention layer's fused products, and of the head's."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv_width = hidden // config.num_attention_heads * config.num_key_value_heads
    return {
        "qkv": (hidden, hidden + 2 * kv_width),
        "out": (hidden, hidden),
        "gate and up": (hidden, 2 * inner),
        "down": (inner, hidden),
        "head": (hidden, config.vocab_size),
    }


class _Timed:
    """Products of random weights on one device."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, size: Size, bytes_per_s: float
    ) -> None:
        self._device, self._dtype, self._size = device, dtype, size
        self._bytes_per_s = bytes_per_s

    def entries(
        self, name: str, num_in: int, num_out: int, is_int8: bool
    ) -> Iterator[dict[str, Any]]:
        """An entry for each number of rows and tiling."""
        weights = self._weights(num_in, num_out, is_int8)
        num_bytes = num_in * num_out * (1 if is_int8 else self._dtype.itemsize)
        for num_rows in dict.fromkeys((1, self._size.batches[-1])):
            rows = torch.randn(num_rows, num_in, device=self._device).to(self._dtype)
            for told, calls in self._ways(weights, num_rows):
                entry: dict[str, Any] = {"product": name, "rows": num_rows, **told}
                try:
                    us = self._us(rows, calls)
                except Exception as error:  # a tiling may ask for more than a GPU has
                    yield entry | {"error": " ".join(str(error).split())[:200]}
                    continue
                share = num_bytes / self._bytes_per_s / us * 1e6
                yield entry | {"us": round(us, 3), "share_of_bandwidth": round(share, 4)}

    def _weights(self, num_in: int, num_out: int, is_int8: bool) -> list[Any]:
        """So many of the same shape that none is in the cache when its turn comes again."""
        num_bytes = num_in * num_out * (1 if is_int8 else self._dtype.itemsize)
        total = ROTATED_BYTES if self._device.type == "cuda" else 1
        drawn = (
            torch.randn(num_out, num_in, device=self._device).to(self._dtype)
            for _ in range(max(1, min(64, -(-total // num_bytes))))
        )
        return [quantize(one, self._dtype) if is_int8 else one for one in drawn]

    def _ways(
        self, weights: Sequence[Any], num_rows: int
    ) -> Iterator[tuple[dict[str, Any], list[Product]]]:
        """What tells a way, and its products, one a weight."""
        if not isinstance(weights[0], Int8Weight):
            yield {}, [lambda rows, one=one: F.linear(rows, one) for one in weights]
            return
        yield {}, [Int8Linear(one) for one in weights]
        if not self._size.sweeps or num_rows != 1:
            return
        for tiles in SWEPT:
            yield (
                {"tiles": asdict(tiles)},
                [
                    lambda rows, one=one, tiles=tiles: fused_product(
                        rows, one.codes, one.scales, tiles
                    )
                    for one in weights
                ],
            )

    @torch.inference_mode()
    def _us(self, rows: Tensor, calls: Sequence[Product]) -> float:
        """Microseconds of one call: of all in turn, recorded as one graph where there is a GPU.

        A launch from Python takes longer than the kernels do.
        """
        clock = Clock(self._device)

        def all_calls() -> None:
            for call in calls:
                call(rows)

        all_calls()
        run = all_calls
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_calls()
            run = graph.replay
        run()
        marks = []
        for _ in range(REPLAYS):
            begin = clock.mark()
            run()
            marks.append((begin, clock.mark()))
        clock.wait()
        return 1e3 * statistics.median(clock.ms(*pair) for pair in marks) / len(calls)
