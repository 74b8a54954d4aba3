"""Products of bfloat16 states in float32: the exact sums, rounded once, from MIN_ROWS rows on."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlmserve.models.attention import sdpa
from vlmserve.models.decoder.int8.linear import FEW_ROWS_CPU_FLOAT32, Int8Linear
from vlmserve.models.decoder.int8.quantizer import quantize
from vlmserve.models.decoder.packed_linear import can_pack, pack_linears
from vlmserve.models.kernels import float32_products
from vlmserve.models.kernels.float32_products import (
    CHUNK,
    MIN_ROWS,
    WidenedLinear,
    WidenedPatches,
    sums,
)

HALF = torch.bfloat16


@pytest.fixture
def is_faster(request, monkeypatch):
    """What the trial of this CPU found: True unless the test is given something else."""
    found = getattr(request, "param", True)
    monkeypatch.setattr(float32_products, "is_bfloat16_slow", lambda: found)
    return found


def random(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(8, 48, 80), (64, 1024, 700), (9, CHUNK // 2, 7), (8, 3, 1)])
@torch.inference_mode()
def test_the_sums_are_those_of_float32_in_parts_of_any_size(shape, threads):
    num_rows, num_in, num_out = shape
    rows, weight = random(num_rows, num_in), random(num_out, num_in)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = sums(rows, weight)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.float32
    exact = rows.double() @ weight.double().T
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("num_rows", [1, MIN_ROWS - 1, MIN_ROWS, 70])
@pytest.mark.parametrize("is_faster", [True, False], indirect=True)
@torch.inference_mode()
def test_a_product_plus_an_addend_is_rounded_once(is_faster, num_rows):
    rows, weight, addend = random(num_rows, 96), random(64, 96), random(num_rows, 64)
    for found, exact in (
        (float32_products.linear(rows, weight), rows.double() @ weight.double().T),
        (
            float32_products.linear(rows, weight, addend),
            addend.double() + rows.double() @ weight.double().T,
        ),
    ):
        assert found.dtype == HALF
        # half a unit in the last place of bfloat16's 8 bits, and the order of the sums
        assert (found.double() - exact).abs().le(exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_a_layer_keeps_its_weight_and_shape(is_faster, has_bias, monkeypatch):
    monkeypatch.setattr("vlmserve.models.decoder.packed_linear._has_operators", lambda dtype: False)
    linear = nn.Linear(48, 80, bias=has_bias, dtype=HALF)
    weight = linear.weight
    model = nn.Sequential(linear, nn.Linear(80, 8))
    assert pack_linears(model) == 0
    assert [type(layer) for layer in model] == [WidenedLinear, nn.Linear]
    assert model[0].weight is weight
    states = random(2, 5, 48)
    found = model[0](states)
    assert found.shape == (2, 5, 80)
    exact = states.double() @ weight.double().T + (linear.bias.double() if has_bias else 0)
    torch.testing.assert_close(found.double(), exact, atol=1e-2, rtol=2**-8)


@pytest.mark.parametrize("num_rows", [8, FEW_ROWS_CPU_FLOAT32, FEW_ROWS_CPU_FLOAT32 + 1, 100])
@torch.inference_mode()
def test_int8_codes_give_the_scaled_sums_rounded_once(is_faster, num_rows):
    weight, rows = random(72, 96), random(num_rows, 96)
    int8 = quantize(weight, HALF)
    found = Int8Linear(int8)(rows)
    exact = rows.double() @ (int8.codes.double() * int8.scales.double()[:, None]).T
    assert (found.double() - exact).abs().le(exact.abs() * 2**-7 + 1e-3).all()


@torch.inference_mode()
def test_rows_of_other_types_never_take_float32(is_faster):
    assert not float32_products.is_faster(random(64, 8, dtype=torch.float32))
    assert not float32_products.is_faster(torch.ones(64, 8, dtype=HALF, device="meta"))


@torch.inference_mode()
def test_the_buffer_is_written_outside_inference_mode_too():
    sums(random(8, 16), random(4, 16))
    with torch.inference_mode(False), torch.no_grad():
        assert sums(random(8, 16), random(4, 16)).shape == (8, 4)


def test_a_cpu_that_packs_weights_never_asks_for_the_trial(monkeypatch):
    if not can_pack(torch.ones(1, dtype=HALF)):
        pytest.skip("this CPU cannot pack")

    def fail() -> bool:
        raise AssertionError("tried")

    monkeypatch.setattr(float32_products, "is_bfloat16_slow", fail)
    model = nn.Sequential(nn.Linear(8, 8, dtype=HALF))
    pack_linears(model)
    with torch.inference_mode():
        model(random(16, 8))


@pytest.mark.parametrize("shape", [(2, 3, 56, 56), (1, 3, 60, 56)])
@torch.inference_mode()
def test_patches_are_those_of_the_convolution(is_faster, shape, monkeypatch):
    embedding = nn.Conv2d(3, 32, 14, stride=14, bias=False, dtype=HALF)
    model, tiles = nn.Sequential(embedding), random(*shape)
    exact = copy.deepcopy(embedding).float()(tiles.float())
    monkeypatch.setattr("vlmserve.models.decoder.packed_linear._has_operators", lambda dtype: False)
    pack_linears(model)
    assert type(model[0]) is WidenedPatches
    found = model(tiles)
    assert found.shape == exact.shape
    assert found.dtype == HALF
    torch.testing.assert_close(found.float(), exact, atol=1e-2, rtol=2**-8)


def test_a_decode_leaves_wide_products_where_they_are_slow(monkeypatch):
    """There SDPA takes an eighth of their time."""
    query = torch.empty(16, 12, 64, dtype=HALF)
    bucket = SimpleNamespace(num_rows=16, key_len=260, query_len=1)
    for is_slow in (True, False):
        monkeypatch.setattr(sdpa, "is_bfloat16_slow", lambda found=is_slow: found)
        assert sdpa._prefers_wide_products(query, bucket) is not is_slow
        assert sdpa._prefers_wide_products(query.half(), bucket)


@pytest.mark.parametrize(
    ("has_instructions", "seconds", "is_slow"),
    [(True, [], False), (False, [2.0, 1.0], True), (False, [1.1, 1.0], False)],
)
def test_only_a_cpu_without_instructions_is_tried(
    monkeypatch, has_instructions, seconds, is_slow
) -> None:
    left = list(seconds)
    monkeypatch.setattr(float32_products, "_has_instructions", lambda: has_instructions)
    monkeypatch.setattr(float32_products, "fastest_s", lambda run: left.pop(0))
    assert float32_products.is_bfloat16_slow.__wrapped__() is is_slow
    assert not left


@pytest.mark.parametrize("is_faster", [False], indirect=True)
def test_without_a_gain_layers_keep_their_class(is_faster, monkeypatch):
    monkeypatch.setattr("vlmserve.models.decoder.packed_linear._has_operators", lambda dtype: False)
    patches = nn.Conv2d(3, 8, 14, stride=14, bias=False, dtype=HALF)
    model = nn.Sequential(patches, nn.Linear(8, 8, dtype=HALF))
    assert pack_linears(model) == 0
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Linear]
