"""Coded weights: decode, the layer, and the fused kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlmserve.models.decoder.coded import linear
from vlmserve.models.decoder.coded.layout import Coding, Layout
from vlmserve.models.decoder.coded.linear import CodedLinear
from vlmserve.models.decoder.coded.product import (
    fused_product,
    random_weight,
    tiles_of,
    trial_pairs,
)
from vlmserve.models.decoder.coded.weight import CodedWeight, can_join, join, quantize_fp8
from vlmserve.models.kernels.self_test import TOLERANCE, _largest_error

FORMS = [
    (Coding.INT8, 1, False),
    (Coding.INT8, 2, True),
    (Coding.FP8, 1, False),
    (Coding.INT4, 2, False),
    (Coding.INT4, 4, True),
    (Coding.TABLE4, 2, False),
]


def expected_weight(weight: CodedWeight) -> torch.Tensor:
    """The formula of layout.py, value by value."""
    num_out, num_in = weight.shape
    values = torch.empty(num_out, num_in)
    for out in range(num_out):
        for column in range(num_in):
            group = column // weight.group
            if weight.coding.bits == 4:
                code = int(weight.codes[out, column // 2]) >> 4 * (column % 2) & 15
                value = float(code - 8) if weight.table is None else float(weight.table[code])
            elif weight.coding is Coding.FP8:
                value = float(weight.codes[out, column].view(torch.float8_e4m3fn))
            else:
                value = float(weight.codes[out, column])
            if weight.zeros is not None:
                value -= int(weight.zeros[out, group])
            values[out, column] = value * float(weight.scales[out, group])
    return values


@pytest.mark.parametrize(("coding", "groups", "has_zeros"), FORMS)
def test_a_weight_decodes_by_the_formula(coding, groups, has_zeros) -> None:
    weight = random_weight(coding, 5, 16, groups, has_zeros=has_zeros)
    decoded = weight.decode(dtype=torch.float32)
    torch.testing.assert_close(decoded, expected_weight(weight), atol=1e-7, rtol=1e-6)
    assert torch.equal(weight.decode(slice(1, 3), dtype=torch.float32), decoded[1:3])


def test_every_fp8_code_decodes_as_torch_has_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].repeat(2, 1)  # without NaN
    scales = torch.tensor([[1.0], [0.37]])
    decoded = CodedWeight(Coding.FP8, codes, scales).decode(dtype=torch.float32)
    assert torch.equal(decoded, codes.view(torch.float8_e4m3fn).float() * scales)


def test_every_fp8_code_decodes_as_torch_has_it_in_the_kernel() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].repeat(16, 1)  # without NaN
    weight = CodedWeight(Coding.FP8, codes, torch.ones(16, 1))
    rows = torch.eye(codes.shape[1])
    expected = weight.decode(dtype=torch.float32).T
    assert torch.equal(fused_product(rows[:64], weight), expected[:64])
    assert torch.equal(fused_product(rows[190:], weight), expected[190:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("coding", "groups", "has_zeros"), FORMS)
def test_the_layer_equals_a_linear_layer_with_the_dequantized_weight(
    coding, groups, has_zeros, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(linear, "CHUNK_CPU", 64 * 7)
    weight = random_weight(coding, 20, 64, groups, has_zeros=has_zeros)
    states = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = CodedLinear(weight, dtype)(states)
    expected = F.linear(states.float(), weight.whole(dtype).float())
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out"), [(1, 64, 48), (3, 192, 33), (20, 2048, 16)]
)
@pytest.mark.parametrize(("coding", "groups", "has_zeros"), FORMS)
def test_the_fused_kernel_equals_the_dense_product(
    coding, groups, has_zeros, num_rows, num_in, num_out, dtype
) -> None:
    weight = random_weight(coding, num_out, num_in, groups, has_zeros=has_zeros)
    rows = torch.randn(num_rows, num_in, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = rows.double() @ weight.whole(dtype).double().T
    result = fused_product(rows, weight)
    # the interpreter truncates to bfloat16
    tolerance = (1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max().item()
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=0.0)


def test_a_round_reads_one_scale_a_channel_for_groups_of_64_and_128() -> None:
    """It read a scale for each code: four bytes beside one, or beside half a one."""
    for group in (64, 128, 192, 512, 4_096):
        for num_rows in (1, 32, 64, 256):
            assert group % tiles_of(num_rows, group).block_k == 0
    assert tiles_of(1, 96).block_k == 128  # no round fits its groups


FIRST, *OTHERS = Coding


@pytest.mark.parametrize(
    "coding", [FIRST, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_the_trial_that_loading_runs_is_right(coding) -> None:
    pairs = trial_pairs(coding, torch.device("cpu"), torch.float32)
    assert max(_largest_error(*pair) for pair in pairs) < TOLERANCE


def test_columns_in_another_order_are_multiplied_with_their_own_inputs() -> None:
    weight = random_weight(Coding.INT4, 6, 16, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    ordered = CodedWeight(weight.coding, weight.codes, weight.scales, order=order)
    states = torch.randn(3, 16)
    expected = F.linear(states, ordered.whole(torch.float32))
    torch.testing.assert_close(CodedLinear(ordered, torch.float32)(states), expected)
    assert not torch.equal(ordered.whole(torch.float32), weight.whole(torch.float32))


@pytest.mark.parametrize(("coding", "groups", "has_zeros"), FORMS)
def test_weights_join_by_outputs_and_are_cut_along_both_sides(coding, groups, has_zeros) -> None:
    one, other = (random_weight(coding, 8, 32, groups, seed, has_zeros) for seed in (0, 1))
    if coding is Coding.TABLE4:
        assert not can_join([one, other])  # their tables differ
        other = CodedWeight(coding, other.codes, other.scales, table=one.table)
    assert can_join([one, other])
    both = torch.cat([one.whole(torch.float32), other.whole(torch.float32)])
    joined = join([one, other])
    assert torch.equal(joined.whole(torch.float32), both)
    half = slice(16, 32)
    assert torch.equal(joined.inputs(half).whole(torch.float32), both[:, half])
    assert torch.equal(joined.outputs(slice(4, 12)).whole(torch.float32), both[4:12])
    assert not can_join([one, random_weight(coding, 8, 32, groups * 2, 0, has_zeros)])


def test_a_cut_through_a_group_is_refused() -> None:
    weight = random_weight(Coding.INT4, 4, 32, 1)
    assert weight.inputs(slice(0, 16)).shape == (4, 16)
    grouped = random_weight(Coding.INT4, 4, 48, 3)
    with pytest.raises(ValueError, match="groups of 16 inputs"):
        grouped.inputs(slice(0, 24))


@pytest.mark.parametrize(("coding", "groups", "has_zeros"), FORMS)
def test_the_arithmetic_counts_what_a_layer_keeps(coding, groups, has_zeros) -> None:
    weight = random_weight(coding, 64, 128, groups, has_zeros=has_zeros)
    layout = Layout(coding, None if groups == 1 else 128 // groups, has_zeros)
    kept = sum(one.nbytes for one in CodedLinear(weight, torch.float32).buffers())
    # a layer keeps both values of a byte and its table besides
    assert 0 <= kept - layout.kept_bytes((64, 128)) <= 256 * 2 * 4 + 16 * 4


def test_fp8_keeps_each_channels_largest_weight_and_refuses_nan() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 2, 6)[:, None]
    weight[3] = 0
    back = quantize_fp8(weight).whole(torch.float32)
    assert (
        (back - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1)[:, None] / 2**14
    ).all()
    torch.testing.assert_close(back.abs().amax(1), weight.abs().amax(1))
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_fp8(weight)
