"""Models of random weights that no file holds: drawn on the device, the same for each name."""

from __future__ import annotations

import pytest
import torch
from support.oracle import dequantize
from torch import nn

from vlmserve.bench.checkpoints import layout
from vlmserve.models.batch import CrossSegment, SamplingParams, ScheduledSequence, StepBatch
from vlmserve.models.create_runner import create_runner
from vlmserve.models.decoder.int8.linear import Int8Linear
from vlmserve.models.decoder.int8.quantizer import Int8Weight, quantize
from vlmserve.models.errors import ModelError
from vlmserve.models.settings.runner_config import RunnerConfig
from vlmserve.models.weights.device_map import given_map, on_one_device
from vlmserve.models.weights.loader import load
from vlmserve.models.weights.random_weights import GATE, random_checkpoint

CPU = torch.device("cpu")
QUERY = "model.language_model.layers.0.self_attn.q_proj"


def model_of(
    quantize: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    checkpoint = random_checkpoint(layout("tiny"), dtype, seed)
    placement = on_one_device(checkpoint.meta_model, CPU)
    return load(checkpoint, placement, quantize, is_fused=False).model


def test_every_weight_is_drawn_and_the_seed_says_which() -> None:
    first, again, other = model_of(), model_of(), model_of(seed=1)
    for name, parameter in first.named_parameters():
        assert parameter.device == CPU, name
        assert torch.equal(parameter, again.get_parameter(name)), name
        if parameter.numel() > 1:
            assert not torch.equal(parameter, other.get_parameter(name)), name
            assert parameter.std() > 0, name


def test_another_dtype_rounds_the_same_weights() -> None:
    exact, rounded = model_of(), model_of(dtype=torch.bfloat16)
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()), name


def test_no_gate_hides_its_layer() -> None:
    gates = [p for name, p in model_of().named_parameters() if "gate" in name and p.numel() == 1]
    assert len(gates) > 4
    assert all(gate.item() == pytest.approx(GATE) for gate in gates)


def test_an_int8_model_rounds_the_weights_that_the_plain_one_has() -> None:
    rounded, plain = model_of("int8").get_submodule(QUERY), model_of().get_submodule(QUERY)
    assert isinstance(rounded, Int8Linear)
    expected = dequantize(quantize(plain.weight, torch.float32))
    assert torch.equal(dequantize(Int8Weight(rounded.codes, rounded.scales)), expected)


@pytest.mark.parametrize("method", [None, "int8"])
def test_a_runner_of_random_weights_computes_a_step(method: str | None) -> None:
    checkpoint = random_checkpoint(layout("tiny"), torch.float32)
    runner = create_runner(checkpoint, RunnerConfig(device="cpu", quantize=method, max_num_seqs=1))
    assert runner.info.dtype == "float32"
    sequence = ScheduledSequence(
        request_id="one",
        token_ids=[5, 6, 7],
        start=0,
        block_ids=[0],
        segments=[CrossSegment(3, [])],
        sampling=SamplingParams(temperature=0.0),
    )
    result = runner.execute(StepBatch([sequence]))
    assert 0 <= result.token_ids["one"] < runner.info.vocab_size


def test_what_only_transformers_could_read_is_refused_in_one_line() -> None:
    checkpoint = random_checkpoint(layout("tiny"), torch.float32)
    words = "random weights work on one device only, in the compute dtype or with --quantize int8"
    with pytest.raises(ModelError, match=words):
        load(checkpoint, on_one_device(checkpoint.meta_model, CPU), "bitsandbytes")
    split = given_map({"": "cpu", "lm_head": "disk"}, checkpoint.meta_model, 0, "map.json")
    with pytest.raises(ModelError, match=words):
        load(checkpoint, split)
