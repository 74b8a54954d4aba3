"""Products of int8 weights and rows rounded to int8: exact sums, their error, and when they run."""

from __future__ import annotations

import pytest
import torch

from vlmserve.models.decoder.int8 import dynamic, linear
from vlmserve.models.decoder.int8.dynamic import DynamicInt8Weight, is_exact
from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.decoder.int8.quantizer import LARGEST, Int8Weight, quantize
from vlmserve.models.decoder.linear_products import product_of

HALF = torch.bfloat16
# 63 is exact on every CPU; 127 with VNNI instructions only.
LARGEST_CODES = [63, LARGEST]


@pytest.fixture(params=LARGEST_CODES)
def largest(request) -> int:
    if not is_exact(request.param):
        pytest.skip("this CPU or torch has no exact products of such codes")
    return request.param


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(rows: torch.Tensor, largest: int) -> torch.Tensor:
    """The rows as their codes give them."""
    scales = rows.float().abs().amax(-1, keepdim=True) / largest
    return (rows.float() / scales).round().double() * scales.double()


@pytest.mark.parametrize("shape", [(1, 300), (7, 300), (2, 3, 300), (130, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@torch.inference_mode()
def test_the_product_is_that_of_the_rounded_rows_and_the_weight(largest, shape, dtype) -> None:
    weight = quantize(random(40, 300), dtype)
    rows, addend = random(*shape, seed=1, dtype=dtype), random(*shape[:-1], 40, dtype=dtype)
    exact = rounded(rows, largest) @ (weight.codes.double() * weight.scales.double()[:, None]).T
    product = DynamicInt8Weight(weight, largest)
    unit = {"atol": 1e-4, "rtol": 2**-8 if dtype == HALF else 1e-5}
    torch.testing.assert_close(product.product(rows).double(), exact, **unit)
    plus = product.product_plus(rows, addend)
    assert plus.dtype == dtype
    torch.testing.assert_close(plus.double(), exact + addend.double(), **unit)


@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(largest) -> None:
    product = DynamicInt8Weight(quantize(random(64, 512), HALF), largest)
    rows = random(200, 512, dtype=HALF) * torch.logspace(-6, 6, 200)[:, None].to(HALF)
    together = product.product(rows)
    for count in (1, 3, 17):
        assert torch.equal(product.product(rows[5 : 5 + count]), together[5 : 5 + count])


@torch.inference_mode()
def test_rows_of_zeros_and_of_numbers_that_are_none_change_no_other(largest) -> None:
    product = DynamicInt8Weight(quantize(random(64, 512), torch.float32), largest)
    rows = random(4, 512)
    alone = product.product(rows)
    rows[1] = 0
    rows[2, 7] = float("inf")
    rows[3, 7] = float("nan")
    found = product.product(rows)
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], torch.zeros(64))
    assert not found[2:].isfinite().any()


@torch.inference_mode()
def test_the_error_of_8_bits_beside_that_of_the_weight() -> None:
    """Of random rows: about as large as the weight's own, so the sum of both is 1.4 times it."""
    weight, rows = random(256, 1024), random(64, 1024, seed=1)
    codes = quantize(weight, torch.float32)
    kept = codes.codes.double() * codes.scales.double()[:, None]
    exact = rows.double() @ weight.double().T

    def error(found: torch.Tensor) -> float:
        return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    of_weight, of_both = error(rows.double() @ kept.T), error(rounded(rows, LARGEST) @ kept.T)
    assert 0.004 < of_weight < 0.010
    assert of_weight < of_both < 1.6 * of_weight


def test_sums_that_a_cpu_cuts_off_are_found(monkeypatch) -> None:
    def cut(codes, x_scale, zero, packed, scales, *others):
        sums = codes.float() @ torch.ones(codes.shape[1], 2) * LARGEST
        return sums.clamp_(max=2.0**15)

    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", cut)
    assert not is_exact.__wrapped__()
    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect of this project is not hidden
        is_exact.__wrapped__()

    def missing(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", missing)
    assert not is_exact.__wrapped__()


@pytest.mark.parametrize(
    ("dtype", "side", "exact", "faster", "is_taken"),
    [
        (HALF, 32, True, True, True),
        (torch.float32, 32, True, True, False),
        (HALF, 31, True, True, False),
        (HALF, 32, False, True, False),
        (HALF, 32, True, False, False),
    ],
)
@torch.inference_mode()
def test_layers_round_rows_only_in_bfloat16_where_it_is_exact_and_faster(
    monkeypatch, dtype, side, exact, faster, is_taken
) -> None:
    monkeypatch.setattr(linear, "MIN_DYNAMIC_SIDE", 32)
    monkeypatch.setattr(linear, "_takes_rows", lambda weight: False)
    monkeypatch.setattr(dynamic, "is_exact", lambda: exact)
    monkeypatch.setattr(linear, "is_dynamic_faster", lambda: faster)
    product = product_of([Int8Linear(quantize(random(side, 64), dtype))])
    assert isinstance(product._packed, DynamicInt8Weight) is is_taken
    assert bool(list(product.buffers())) is not is_taken, "the weight is there once"


@pytest.mark.parametrize(
    ("gains", "is_taken"),
    [((1.0, 1.0, 3.0), True), ((1.0, 1.2, 1.4), False), ((0.5, 3.0, 3.0), False)],
)
def test_the_trial_asks_for_a_gain_that_is_worth_the_accuracy(monkeypatch, gains, is_taken) -> None:
    left = [one for gain in gains for one in (gain, 1.0)]
    monkeypatch.setattr("vlmserve.models.kernels.cpu_trial.fastest_s", lambda run: left.pop(0))
    monkeypatch.setattr(linear.row_products, "can_pack", lambda codes: False)
    assert linear.is_dynamic_faster.__wrapped__() is is_taken
    assert not left


def test_a_weight_takes_a_byte_a_number() -> None:
    if not is_exact(63):
        pytest.skip("this torch has no such products")
    codes = torch.zeros(512, 1024, dtype=torch.int8)
    weight = DynamicInt8Weight(Int8Weight(codes, torch.ones(512, dtype=HALF)))
    assert codes.nbytes <= weight.nbytes < 1.05 * codes.nbytes
