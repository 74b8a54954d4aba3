"""Weight-only int8: the rounding, the layer on every device's path, and the fused kernel.

The kernel runs in Triton's interpreter on a CPU, and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.oracle import dequantize
from torch import nn

from vlmserve.models.decoder.int8 import linear, quantizer
from vlmserve.models.decoder.int8.linear import FEW_ROWS_CUDA, Int8Linear
from vlmserve.models.decoder.int8.product import (
    TRIED_ROWS,
    Launch,
    block_m_of,
    choose_splits,
    fused_product,
    tiles_of,
    trial_pairs,
)
from vlmserve.models.decoder.int8.quantizer import Int8Weight, quantize
from vlmserve.models.decoder.linear_products import product_of
from vlmserve.models.kernels import float32_products, row_products
from vlmserve.models.kernels.self_test import TOLERANCE, _largest_error

HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", id="interpreter"),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="there is no CUDA device")],
    ),
]


def weight_of(num_out: int, num_in: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_out, num_in, generator=generator)
    # channels of very different size: one scale for all would lose the small ones
    return rows * torch.logspace(-3, 1, num_out)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_within_half_a_step_of_its_channel(dtype) -> None:
    weight = weight_of(24, 50)
    packed = quantize(weight, dtype)
    assert packed.codes.dtype == torch.int8
    assert packed.scales.dtype == dtype
    assert packed.codes.abs().max() <= 127
    error = (packed.codes.float() * packed.scales.float()[:, None] - weight).abs()
    # bfloat16 rounds a scale by 1 part in 256 at most: the largest weights are then clamped
    slack = 0.501 if dtype == torch.float32 else 1.0
    assert (error <= slack * packed.scales.float()[:, None]).all()


def test_a_weight_is_quantized_the_same_in_parts(monkeypatch) -> None:
    weight = weight_of(13, 7)
    whole = quantize(weight, torch.float32)
    monkeypatch.setattr(quantizer, "CHUNK_ELEMENTS", 21)
    parts = quantize(weight, torch.float32)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_a_channel_of_zeros_stays_zero_and_its_neighbours_are_not_touched() -> None:
    weight = weight_of(3, 8)
    weight[1] = 0
    back = dequantize(quantize(weight, torch.float32))
    assert (back[1] == 0).all()
    assert (back[0] != 0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_no_scale_can_hold_is_refused(value) -> None:
    weight = weight_of(3, 8)
    weight[2, 1] = value
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        quantize(weight, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 4, 5, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_layer_gives_what_a_linear_layer_gives_with_the_same_weight(
    dtype, num_rows, has_bias, monkeypatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK_CPU", 64 * 20)
    packed = quantize(weight_of(48, 64), dtype)
    bias = torch.linspace(-1, 1, 48, dtype=dtype) if has_bias else None
    layer = Int8Linear(packed, bias)
    states = torch.randn(2, num_rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = F.linear(
        states.float(), dequantize(packed).float(), None if bias is None else bias.float()
    )
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2 * expected.abs().max().item()
    result = layer(states)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=0.0)


def test_large_outputs_stay_finite_in_float16() -> None:
    """Sums of codes that were scaled afterwards passed 65,504 on the way."""
    packed = quantize(torch.full((40, 512), 0.01), torch.float16)
    states = torch.full((9, 512), 30.0, dtype=torch.float16)
    result = Int8Linear(packed)(states)
    torch.testing.assert_close(result.float(), torch.full((9, 40), 153.6), atol=0.0, rtol=2e-3)


def test_the_layer_takes_half_the_bytes_of_bfloat16() -> None:
    layer = Int8Linear(quantize(weight_of(256, 256), torch.bfloat16))
    held = sum(buffer.nbytes for buffer in layer.buffers())
    whole = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16).weight.nbytes
    assert held == whole // 2 + 256 * 2
    assert not list(layer.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out"),
    [(1, 64, 48), (3, 200, 33), (16, 2048, 32), (20, 1100, 70), (64, 96, 16), (130, 2100, 40)],
)
def test_the_fused_kernel_equals_the_dense_product(
    device, dtype, num_rows, num_in, num_out
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, num_in, generator=generator).to(dtype)
    codes = torch.randint(-127, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    scales = torch.rand(num_out, generator=generator).to(dtype) / 127
    expected = rows.double() @ (codes.double() * scales.double()[:, None]).T
    result = fused_product(rows.to(device), codes.to(device), scales.to(device)).cpu()
    assert result.dtype == dtype
    tolerance = (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max().item()
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=0.0)


def test_the_fused_kernel_reads_rows_where_they_lie() -> None:
    """A slice of a wider tensor, as of a fused product's output, is not copied."""
    wide = torch.randn(4, 100)
    packed = quantize(weight_of(20, 60), torch.float32)
    result = fused_product(wide[:, 10:70], packed.codes, packed.scales)
    expected = F.linear(wide[:, 10:70], dequantize(packed))
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0.0)


def test_small_weights_are_split_over_their_inputs_and_large_ones_are_not() -> None:
    assert choose_splits(num_tiles=448, num_in=4096) == 1
    assert choose_splits(num_tiles=32, num_in=4096) == 4
    assert choose_splits(num_tiles=32, num_in=512) == 1
    assert choose_splits(num_tiles=128, num_in=14336) == 2


def test_the_trial_that_loading_runs_is_right_for_every_number_of_rows() -> None:
    pairs = trial_pairs(torch.device("cpu"), torch.float32)
    assert len(pairs) == len(TRIED_ROWS)
    assert max(_largest_error(*pair) for pair in pairs) < TOLERANCE
    blocks = [(tiles_of(rows), block_m_of(rows)) for rows in range(1, FEW_ROWS_CUDA + 1)]
    assert {(tiles_of(rows), block_m_of(rows)) for rows in TRIED_ROWS} == set(blocks)


def shapes_of(hidden: int, inner: int, kv_width: int, ranks: int) -> list[tuple[int, int]]:
    """Outputs and inputs of a rank's products in a self-attention layer."""
    qkv, gate_up = (hidden + 2 * kv_width) // ranks, 2 * inner // ranks
    return [(qkv, hidden), (hidden, hidden // ranks), (gate_up, hidden), (hidden, inner // ranks)]


MODELS = {"11B": (4_096, 14_336, 1_024), "90B": (8_192, 28_672, 1_024)}


def launch_of(num_rows: int, num_out: int, num_in: int) -> Launch:
    rows = torch.empty(num_rows, num_in, dtype=torch.bfloat16, device="meta")
    return Launch.of(rows, num_out, tiles_of(num_rows))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_fused_product_moves_fewer_bytes_than_unpacking(model, ranks) -> None:
    """A decode step beside a prompt's chunk read 1 and wrote 2 bytes a weight, and read 2 again.

    Even if no line of rows finds the codes in the GPU's cache.
    """
    shapes = shapes_of(*model, ranks)
    num_weights = sum(num_out * num_in for num_out, num_in in shapes)
    for num_rows in range(1, FEW_ROWS_CUDA + 1):
        num_bytes = 0
        for num_out, num_in in shapes:
            launch = launch_of(num_rows, num_out, num_in)
            lines, _, splits = launch.grid
            num_bytes += lines * num_out * num_in
            if splits > 1:
                num_bytes += 2 * launch.output.numel() * 4
        assert num_bytes < 5 * num_weights, num_rows
        if num_rows <= 16:
            assert num_bytes < 1.15 * num_weights


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_decode_step_has_enough_codes_in_flight_for_the_bandwidth(model) -> None:
    """About 25 KB a processor of an H100, by Little's law; it was 12 for queries, keys, values."""
    for num_out, num_in in shapes_of(*model, 1):
        lines, columns, splits = launch_of(1, num_out, num_in).grid
        assert lines * columns * splits / 132 * tiles_of(1).ahead_bytes >= 25_000


@pytest.mark.parametrize(("is_bfloat16_slow", "most"), [(False, 8), (True, 16)])
def test_few_rows_of_bfloat16_take_the_int8_kernel_and_others_are_unpacked_for(
    monkeypatch, is_bfloat16_slow, most
) -> None:
    taken = []
    monkeypatch.setattr(float32_products, "is_bfloat16_slow", lambda: is_bfloat16_slow)
    monkeypatch.setattr(Int8Linear, "_few", lambda self, rows: taken.append("few") or rows)
    monkeypatch.setattr(Int8Linear, "_many", lambda self, rows: taken.append("many") or rows)
    layer = Int8Linear(Int8Weight(torch.zeros(8, 8, dtype=torch.int8), torch.ones(8)))
    for num_rows in (most, most + 1):
        layer(torch.ones(num_rows, 8, dtype=torch.bfloat16))
    layer(torch.ones(2, 8))
    assert taken == ["few", "many", "many"]


@torch.inference_mode()
def test_a_cpus_product_takes_the_c_where_it_is_faster_and_rounds_once(monkeypatch):
    if row_products._loaded() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(row_products, "MIN_SIDE", 1)
    generator = torch.Generator().manual_seed(0)
    for dtype, unit in ((torch.float32, 2**-20), (torch.bfloat16, 2**-8)):
        weights = [torch.randn(width, 96, generator=generator) for width in (40, 24)]
        layers = [Int8Linear(quantize(weight, dtype)) for weight in weights]
        for is_faster in (True, False):
            monkeypatch.setattr(linear, "are_rows_faster", lambda dtype, found=is_faster: found)
            product = product_of(layers)
            assert (product._packed is not None) is is_faster
        monkeypatch.setattr(linear, "are_rows_faster", lambda dtype: True)
        product = product_of(layers)
        assert not list(product.buffers())
        rows = torch.randn(5, 96, generator=generator).to(dtype)
        addend = torch.randn(5, 64, generator=generator).to(dtype)
        codes = torch.cat(
            [layer.codes.double() * layer.scales.double()[:, None] for layer in layers]
        )
        exact = rows.double() @ codes.T
        torch.testing.assert_close(product(rows).double(), exact, atol=1e-4, rtol=unit)
        found = product.plus(rows, addend).double()
        torch.testing.assert_close(found, exact + addend.double(), atol=1e-4, rtol=unit)
