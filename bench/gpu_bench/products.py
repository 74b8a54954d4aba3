"""Times the decoder's products alone, in plain and in int8 weights, against the copy bandwidth.

Owns the shapes, the copies that keep a weight out of the GPU's cache, and the tilings of a sweep.
Knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.decoder.int8.product import TILES, Tiles, fused_product
from vlmserve.models.decoder.int8.quantizer import quantize
from vlmserve.models.execution.runner import ModelRunner

from ..bounds import Machine
from .clock import Clock
from .plan import INT8, Row, Size

# bytes of weights that are read between two reads of a weight: several times a GPU's cache
ROTATED_BYTES = 1 << 28
REPLAYS = 5
# numbers of rows: from 16 to 256 a product unpacks no weight; with 320 rows it does
INT8_ROWS = (16, 64, 128, 256, 320)
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


def products(runner: ModelRunner, row: Row, size: Size, machine: Machine) -> dict[str, Any]:
    """Microseconds of each product by rows, and its share of the bandwidth."""
    shapes, is_int8 = shapes_of(runner.config.text_config), row.quantize == INT8
    if is_int8:
        del shapes["head"]
    found = [
        {"product": name, **entry}
        for name, shape in shapes.items()
        for entry in _entries(*shape, is_int8, size, machine.bytes_per_s)
    ]
    return {"products": found}


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


def _entries(
    num_in: int, num_out: int, is_int8: bool, size: Size, bytes_per_s: float
) -> Iterator[dict[str, Any]]:
    """An entry for each number of rows and each tiling."""
    dtype = getattr(torch, size.dtype)
    num_bytes = num_in * num_out * (1 if is_int8 else dtype.itemsize)
    total = ROTATED_BYTES if size.device == "cuda" else 1
    # enough weights of the shape that none is in the cache when its turn comes again
    weights: list[Any] = [
        torch.randn(num_out, num_in, device=size.device).to(dtype)
        for _ in range(max(1, min(64, -(-total // num_bytes))))
    ]
    if is_int8:
        weights = [quantize(one, dtype) for one in weights]
    for num_rows in dict.fromkeys((1, size.batches[-1], *(INT8_ROWS if is_int8 else ()))):
        rows = torch.randn(num_rows, num_in, device=size.device).to(dtype)
        for facts, calls in _ways(weights, is_int8, sweeps=size.sweeps and num_rows == 1):
            entry: dict[str, Any] = {"rows": num_rows, **facts}
            try:
                us = _microseconds(rows, calls, size.device)
            except Exception as error:  # a tiling may ask for more than a GPU has
                yield entry | {"error": " ".join(str(error).split())[:200]}
                continue
            share = num_bytes / bytes_per_s / us * 1e6
            yield entry | {"us": round(us, 3), "share_of_bandwidth": round(share, 4)}


def _ways(
    weights: Sequence[Any], is_int8: bool, *, sweeps: bool
) -> Iterator[tuple[dict[str, Any], list[Product]]]:
    """Each way to compute the product: its name as fields, and a product for each weight."""
    yield {}, [Int8Linear(one) if is_int8 else partial(F.linear, weight=one) for one in weights]
    for tiles in SWEPT if is_int8 and sweeps else ():
        calls = [_tiled(one, tiles) for one in weights]
        yield {"tiles": asdict(tiles)}, calls


def _tiled(weight: Any, tiles: Tiles) -> Product:
    return lambda rows: fused_product(rows, weight.codes, weight.scales, tiles)


@torch.inference_mode()
def _microseconds(rows: Tensor, calls: Sequence[Product], device: str) -> float:
    """Microseconds of a call: all calls in turn, as one graph on a GPU.

    A launch from Python takes longer than the kernels.
    """
    clock = Clock(device)

    def all_calls() -> None:
        for call in calls:
            call(rows)

    all_calls()
    run: Callable[[], object] = all_calls
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        run = graph.replay
    run()
    marks = []
    for _ in range(REPLAYS):
        start = clock.mark()
        run()
        marks.append((start, clock.mark()))
    clock.wait()
    return 1e3 * clock.median_ms(marks) / len(calls)
