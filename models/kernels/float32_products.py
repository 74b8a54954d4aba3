"""Products of bfloat16 states in float32, for a CPU without bfloat16 instructions.

torch's own product widens each number again for each row there. Here some channels of the weight at
a time are widened once for all rows, into a buffer that stays in the CPU's cache. The weight keeps
its two bytes a number. Sums are in float32, as in torch's product, and are rounded once.

Milliseconds of a product of [rows, 2048] and [2048, 2048], one thread of an EPYC with AVX2:

    rows   bfloat16   float32     rows   bfloat16   float32
       1       1.9        3.3        8        8.0       6.1
       4       4.2        4.0       64       58.5      15.3
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu_trial import fastest_s, one_thread

logger = logging.getLogger(__name__)

# Numbers of a weight to widen at once, for each thread that computes: 1 MiB.
CHUNK = 1 << 18
# With fewer rows reading the weight dominates, and bfloat16 is half the bytes.
MIN_ROWS = 4
# The trial: its rows, the side of its square weight, and how much faster float32 must be.
TRIED_ROWS, TRIED_SIZE, LEAST_GAIN = 16, 1024, 1.2
_buffers = threading.local()


def is_faster(rows: Tensor) -> bool:
    """Whether a product of these rows, [num_rows, in_features], is faster in float32 here."""
    return len(rows) >= MIN_ROWS and widens(rows.dtype, rows.device)


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type on this device may be computed in float32."""
    return dtype == torch.bfloat16 and device.type == "cpu" and is_bfloat16_slow()


def sums(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [num_rows, in] times weight [out, in], of any dtypes: float32 [num_rows, out]."""
    num_out, num_in = weight.shape
    size = max(1, CHUNK * torch.get_num_threads() // num_in)
    widened = _buffer(min(size, num_out) * num_in)
    states = rows.float()
    result = states.new_empty(len(rows), num_out)
    for start in range(0, num_out, size):
        channels = weight[start : start + size]
        part = widened[: channels.numel()].view(channels.shape).copy_(channels)
        torch.mm(states, part.T, out=result[:, start : start + size])
    return result


def linear(rows: Tensor, weight: Tensor, addend: Tensor | None = None) -> Tensor:
    """As `F.linear` of rows [num_rows, in] and weight [out, in], by the faster way.

    addend: [num_rows, out] or [out]; the product plus it is rounded once.
    """
    if is_faster(rows):
        result = sums(rows, weight)
        return (result if addend is None else result.add_(addend)).to(rows.dtype)
    if addend is None or addend.dim() == 1:
        return F.linear(rows, weight, addend)
    return torch.addmm(addend, rows, weight.T)


class WidenedLinear(nn.Linear):
    """An `nn.Linear` by the faster way. Inference only."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        rows = states.reshape(-1, self.in_features)
        return linear(rows, self.weight, self.bias).view(*states.shape[:-1], self.out_features)


class WidenedPatches(nn.Conv2d):
    """A convolution whose patches do not overlap, as a product of the patches' pixels."""

    @classmethod
    def can_replace(cls, layer: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether a layer is such a convolution, without a bias."""
        if type(layer) is not nn.Conv2d or layer.bias is not None:
            return False
        has_gaps = layer.stride != layer.kernel_size or layer.dilation != (1, 1)
        return not has_gaps and layer.groups == 1 and layer.padding in ("valid", (0, 0))

    def forward(self, pixels: Tensor) -> Tensor:
        """[images, channels, height, width] to [images, out_channels, rows, columns]."""
        height, width = self.kernel_size
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        whole = pixels[:, :, : rows * height, : columns * width]
        patches = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        flat = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
        product = linear(flat, self.weight.flatten(1)).unflatten(0, (-1, rows * columns))
        return product.transpose(1, 2).unflatten(2, (rows, columns))


@functools.cache
def is_bfloat16_slow() -> bool:
    """Whether this CPU computes products of bfloat16 faster in float32.

    Never with instructions for them. Without, a trial of 20 ms decides, once: by the processor time
    of one thread, so that other work on the cores does not change it.
    """
    if _has_instructions():
        return False
    with torch.inference_mode(), one_thread():
        rows = torch.ones(TRIED_ROWS, TRIED_SIZE, dtype=torch.bfloat16)
        weight = torch.ones(TRIED_SIZE, TRIED_SIZE, dtype=torch.bfloat16)
        half_s = fastest_s(lambda: F.linear(rows, weight))
        full_s = fastest_s(lambda: sums(rows, weight).to(rows.dtype))
    logger.debug("a trial product took %.2g s in bfloat16, %.2g s in float32", half_s, full_s)
    return half_s > LEAST_GAIN * full_s


def _has_instructions() -> bool:
    """Whether oneDNN has bfloat16 products for this CPU; True if this torch cannot say."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a private name: torch's compiler asks it
        return True


def _buffer(num_elements: int) -> Tensor:
    """A float32 buffer of this thread, kept for the next product."""
    kept: Tensor | None = getattr(_buffers, "kept", None)
    if kept is None or kept.numel() < num_elements:
        with torch.inference_mode(False):  # else it could not be written outside that mode
            kept = _buffers.kept = torch.empty(num_elements, dtype=torch.float32)
    return kept
