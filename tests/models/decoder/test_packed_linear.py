"""Packed linear layers: the same results from a weight that is reordered once."""

import pytest
import torch
from torch import nn

from vlmserve.models.decoder.packed_linear import PackedLinear, pack_linears

needs_packing = pytest.mark.skipif(
    pack_linears(nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))) == 0,
    reason="this torch or CPU has no packed bfloat16 products",
)


@needs_packing
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (1, 300, 48), (2, 3, 5, 48)])
@torch.inference_mode()
def test_a_packed_layer_gives_what_its_linear_layer_gives(shape, has_bias):
    torch.manual_seed(1)
    linear = nn.Linear(48, 80, bias=has_bias, dtype=torch.bfloat16)
    states = torch.randn(shape, dtype=torch.bfloat16)
    packed = PackedLinear(linear)(states)
    assert packed.shape == (*shape[:-1], 80)
    # both round the same sums to bfloat16; the order of summing may differ
    exact = linear.double()(states.double())
    torch.testing.assert_close(packed.double(), exact, atol=2e-2, rtol=1e-2)


@needs_packing
def test_only_bfloat16_linear_layers_are_exchanged_wherever_they_lie():
    class Special(nn.Linear):
        """A layer that only looks like a linear one, as quantized layers do."""

    inner = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8))
    model = nn.Sequential(
        inner, nn.Linear(8, 8), Special(8, 8, dtype=torch.bfloat16), nn.Embedding(3, 8)
    )
    assert pack_linears(model) == 1
    assert [type(module).__name__ for module in model] == [
        "Sequential",
        "Linear",
        "Special",
        "Embedding",
    ]
    assert isinstance(inner[0], PackedLinear)


@needs_packing
def test_the_original_weight_is_not_kept():
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    pack_linears(model)
    assert not [p for p in model.parameters() if p.dtype == torch.bfloat16 and p.dim() == 2]
