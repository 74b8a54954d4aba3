"""Layers packed for oneDNN: the same results from a weight that is reordered once."""

import pytest
import torch
from support.oracle import checkpoint, oracle_logits, prefill_logits, requests
from torch import nn

from vlmserve.models.create_runner import create_runner
from vlmserve.models.decoder import packed_linear
from vlmserve.models.decoder.linear_products import product_of
from vlmserve.models.decoder.packed_linear import (
    MIN_SIZES,
    PackedLinear,
    PackedWeight,
    is_packed_slow,
    pack_linears,
)
from vlmserve.models.settings.runner_config import RunnerConfig

HALF = torch.bfloat16
TOLERANCES = {torch.float32: 1e-5, HALF: 2e-2}


def needs(dtype: torch.dtype) -> None:
    if not packed_linear._has_operators(dtype):
        pytest.skip(f"this torch or CPU has no packed products in {dtype}")


@pytest.fixture(autouse=True)
def no_rows(monkeypatch):
    """As without a C compiler."""
    monkeypatch.setattr(packed_linear, "_takes_rows", lambda weight: False)


@pytest.fixture(params=list(TOLERANCES), ids=str)
def dtype(request, monkeypatch):
    """A type that this CPU packs, whatever the size of a weight and the outcome of the trial."""
    needs(request.param)
    monkeypatch.setitem(MIN_SIZES, torch.float32, 1)
    monkeypatch.setattr(packed_linear, "is_packed_slow", lambda: False)
    return request.param


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (1, 300, 48), (2, 3, 5, 48)])
@torch.inference_mode()
def test_a_packed_layer_gives_what_its_linear_layer_gives(shape, has_bias, dtype):
    torch.manual_seed(1)
    linear = nn.Linear(48, 80, bias=has_bias, dtype=dtype)
    states = torch.randn(shape, dtype=dtype)
    packed = PackedLinear(linear)(states)
    assert packed.shape == (*shape[:-1], 80)
    # both round the same sums; the order of summing may differ
    exact = linear.double()(states.double())
    torch.testing.assert_close(packed.double(), exact, atol=TOLERANCES[dtype], rtol=1e-2)


@torch.inference_mode()
def test_joined_layers_are_packed_and_take_an_addend(dtype):
    torch.manual_seed(0)
    linears = [nn.Linear(48, width, bias=False, dtype=dtype) for width in (32, 16)]
    states, addend = torch.randn(5, 48, dtype=dtype), torch.randn(5, 48, dtype=dtype)
    product = product_of(linears)
    assert not list(product.parameters())
    exact = torch.cat([linear.double()(states.double()) for linear in linears], dim=-1)
    found = product.plus(states, addend).double()
    atol = TOLERANCES[dtype]
    torch.testing.assert_close(found, exact + addend.double(), atol=atol, rtol=1e-2)


@pytest.mark.parametrize("shape", [(192, 64), (300, 130), (768, 2048)])
@torch.inference_mode()
def test_a_row_in_float32_has_the_same_bits_whatever_rows_are_beside_it(shape):
    needs(torch.float32)
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("seen with AVX2 only")
    torch.manual_seed(0)
    packed, states = PackedWeight(torch.randn(shape)), torch.randn(130, shape[1])
    whole = packed.product(states)
    for count in (1, 2, 7, 9, 33, 64):
        assert torch.equal(packed.product(states[-count:]), whole[-count:])


def test_only_linear_layers_are_exchanged_wherever_they_lie(dtype):
    class Special(nn.Linear):
        """A layer that only looks like a linear one, as quantized layers do."""

    inner = nn.Sequential(nn.Linear(8, 8, dtype=dtype), nn.LayerNorm(8))
    other = nn.Linear(8, 8, dtype=torch.float16)
    model = nn.Sequential(inner, other, Special(8, 8, dtype=dtype), nn.Embedding(3, 8))
    assert pack_linears(model) == 1
    assert [type(module).__name__ for module in model] == [
        "Sequential",
        "Linear",
        "Special",
        "Embedding",
    ]
    assert isinstance(inner[0], PackedLinear)


def test_the_original_weight_is_not_kept(dtype):
    model = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    pack_linears(model)
    assert not [one for one in model.parameters() if one.dim() == 2]


def test_small_weights_in_float32_stay(monkeypatch):
    """A call of the packed product costs more than reordering a small weight."""
    needs(torch.float32)
    monkeypatch.setattr(packed_linear, "is_packed_slow", lambda: False)
    assert pack_linears(nn.Sequential(nn.Linear(512, 511), nn.Linear(512, 512))) == 1


@pytest.mark.parametrize(("plain", "packed", "is_slow"), [(1.0, 1.1, False), (1.0, 1.3, True)])
def test_float32_stays_where_packed_products_are_clearly_slower(
    plain, packed, is_slow, monkeypatch
):
    needs(torch.float32)
    # one row and a few, by torch first
    left = [plain, plain, packed, packed]
    monkeypatch.setattr(packed_linear, "fastest_s", lambda run: left.pop(0))
    found = is_packed_slow.__wrapped__()
    assert (found, left) == (is_slow, [])
    monkeypatch.setattr(packed_linear, "is_packed_slow", lambda: found)
    assert pack_linears(nn.Sequential(nn.Linear(512, 512))) == (not is_slow)


def test_a_model_of_packed_float32_layers_gives_the_oracles_logits(monkeypatch):
    """The tests' models are too small to be packed otherwise."""
    needs(torch.float32)
    monkeypatch.setitem(MIN_SIZES, torch.float32, 1)
    monkeypatch.setattr(packed_linear, "is_packed_slow", lambda: False)
    config = RunnerConfig(
        device="cpu", dtype="float32", block_size=4, num_text_blocks=200, num_image_blocks=40
    )
    runner = create_runner(checkpoint("tiny"), config)
    linears = [one for one in runner._model.modules() if type(one) is nn.Linear]
    assert not linears
    batch = requests("apart", "text")
    for name, logits in prefill_logits(runner, batch, chunk=6).items():
        request = next(one for one in batch if one.request_id == name)
        torch.testing.assert_close(logits, oracle_logits("tiny", request), atol=4e-5, rtol=0.0)
