"""The exchanged decoder layers: which models get them, and the products that they are made of."""

import pytest
import torch
from support.oracle import checkpoint, loaded
from torch import nn
from torch.nn import functional as F
from transformers.models.mllama.modeling_mllama import (
    MllamaTextRMSNorm,
    apply_rotary_pos_emb,
)

from vlmserve.models.decoder.decoder import RmsNorm, fuse_layers, is_fused
from vlmserve.models.decoder.linear_products import product_of
from vlmserve.models.decoder.operations import Rotation
from vlmserve.models.weights.loader import load_model

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.fixture(params=list(TOLERANCES), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def assert_near(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), exact, atol=TOLERANCES[dtype], rtol=1e-2)


@torch.inference_mode()
def test_layers_of_the_same_states_are_one_product_side_by_side(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(48, width, bias=False, dtype=dtype) for width in (32, 16, 8)]
    states, addend = torch.randn(5, 48, dtype=dtype), torch.randn(5, 56, dtype=dtype)
    exact = torch.cat([linear.double()(states.double()) for linear in linears], dim=-1)
    linears = [linear.to(dtype) for linear in linears]
    assert_near(product_of(linears)(states), exact, dtype)
    assert_near(product_of(linears).plus(states, addend), exact + addend.double(), dtype)


@torch.inference_mode()
def test_a_rotation_is_transformers_rotary_embedding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = torch.rand(7, 8, dtype=torch.float64) * 6
    cos, sin = (torch.cat((half, half), dim=-1) for half in (angles.cos(), angles.sin()))
    heads = torch.randn(7, 3, 16, dtype=dtype)
    rows = heads.double().transpose(0, 1)[None]
    exact, _ = apply_rotary_pos_emb(rows, rows, cos[None], sin[None])
    rotated = Rotation(cos.to(dtype), sin.to(dtype))(heads)
    assert_near(rotated, exact[0].transpose(0, 1), dtype)


@torch.inference_mode()
def test_a_norm_is_transformers_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = MllamaTextRMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.copy_(torch.rand(64) + 0.5)
    states = 3 * torch.randn(5, 64, dtype=dtype)
    exact = F.rms_norm(states.double(), (64,), norm.weight.double(), 1e-5)
    assert_near(RmsNorm(norm)(states), exact, dtype)
    assert_near(norm(states), exact, dtype)


def test_a_model_on_one_cpu_gets_fused_layers_and_a_quantized_one_keeps_its_own() -> None:
    assert is_fused(loaded("tiny").model.model.language_model)
    quantized = load_model(checkpoint("tiny"), "cpu", "float32", quantize="bitsandbytes")
    assert not is_fused(quantized.model.model.language_model)


def test_layers_whose_weights_come_by_hooks_are_left_alone() -> None:
    from transformers import MllamaForConditionalGeneration

    model = MllamaForConditionalGeneration.from_pretrained(checkpoint("tiny")).eval()
    text_model = model.model.language_model
    text_model.layers[2].mlp.down_proj._hf_hook = object()
    kinds = [type(layer) for layer in text_model.layers]
    assert not fuse_layers(text_model)
    assert [type(layer) for layer in text_model.layers] == kinds
